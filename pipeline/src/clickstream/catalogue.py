"""The vocabulary of the shop: what the producer may say and what Silver accepts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, NamedTuple

EVENT_TYPES: Final = ("view", "add_to_cart", "purchase")
DEVICE_TYPES: Final = ("mobile", "desktop", "tablet")


class Category(NamedTuple):
    """Prices are drawn from the range; of its views so many become carts, and of its carts so many purchases."""

    low: int
    high: int
    cart_rate: float
    buy_rate: float


# Overall about 70 views to 20 carts to 10 purchases; what is cheap is bought sooner.
CATEGORIES: Final = {
    "Electronics": Category(50, 900, 0.22, 0.40),
    "Clothing": Category(10, 150, 0.32, 0.44),
    "Home": Category(15, 400, 0.26, 0.48),
    "Sports": Category(10, 300, 0.28, 0.50),
    "Books": Category(5, 60, 0.34, 0.62),
    "Beauty": Category(5, 90, 0.32, 0.56),
    "Toys": Category(5, 120, 0.28, 0.52),
}

HIGH_INTEREST_PRODUCT: Final = "prod_0042"
HIGH_INTEREST_SHARE: Final = 0.20
HIGH_INTEREST_WEIGHTS: Final = (95, 4, 1)


@dataclass(frozen=True)
class Product:
    product_id: str
    category: str
    price: Decimal

    @property
    def page_url(self) -> str:
        return f"/product/{self.product_id}"


def products(count: int) -> list[Product]:
    """The fixed catalogue: a product has this category and first price whatever the run, the seed or the count."""
    names = list(CATEGORIES)
    result = []
    for number in range(1, count + 1):
        rng = random.Random(number)
        category = rng.choice(names)
        product_id = f"prod_{number:04d}"
        if product_id == HIGH_INTEREST_PRODUCT:
            category, price = "Electronics", Decimal("299.99")
        else:
            kind = CATEGORIES[category]
            price = Decimal(rng.randrange(kind.low, kind.high)) + Decimal("0.99")
        result.append(Product(product_id, category, price))
    return result
