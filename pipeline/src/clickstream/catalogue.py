"""The vocabulary of the shop: what the producer may say and what Silver accepts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

EVENT_TYPES: Final = ("view", "add_to_cart", "purchase")
DEVICE_TYPES: Final = ("mobile", "desktop", "tablet")
# category -> the range its prices are drawn from
CATEGORIES: Final[dict[str, tuple[int, int]]] = {
    "Electronics": (50, 900),
    "Clothing": (10, 150),
    "Home": (15, 400),
    "Sports": (10, 300),
    "Books": (5, 60),
    "Beauty": (5, 90),
    "Toys": (5, 120),
}

HIGH_INTEREST_PRODUCT: Final = "prod_0042"
HIGH_INTEREST_SHARE: Final = 0.20
HIGH_INTEREST_WEIGHTS: Final = (95, 4, 1)
ORDINARY_WEIGHTS: Final = (70, 20, 10)


@dataclass(frozen=True)
class Product:
    product_id: str
    category: str
    price: Decimal

    @property
    def page_url(self) -> str:
        return f"/product/{self.product_id}"


def products(count: int) -> list[Product]:
    """The fixed catalogue: a product keeps its category and price whatever the run, the seed or the count."""
    names = list(CATEGORIES)
    result = []
    for number in range(1, count + 1):
        rng = random.Random(number)
        category = rng.choice(names)
        product_id = f"prod_{number:04d}"
        if product_id == HIGH_INTEREST_PRODUCT:
            category, price = "Electronics", Decimal("299.99")
        else:
            low, high = CATEGORIES[category]
            price = Decimal(rng.randrange(low, high)) + Decimal("0.99")
        result.append(Product(product_id, category, price))
    return result
