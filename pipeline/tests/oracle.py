"""What Gold's figures mean, in DuckDB's SQL over a table `event` with COLUMNS. It knows nothing of Spark."""

COLUMNS = {
    "event_id": "STRING",
    "event_time": "TIMESTAMP",
    "user_id": "STRING",
    "session_id": "STRING",
    "product_id": "STRING",
    "product_category": "STRING",
    "device_type": "STRING",
    "event_type": "STRING",
    "price": "DECIMAL(12,2)",
}
# The columns of `event` from a column `value` of JSON.
FROM_JSON = ", ".join(
    f"(value ->> '{'timestamp' if name == 'event_time' else name}')::{kind} AS {name}" for name, kind in COLUMNS.items()
)
COUNTS = """
    count(*) FILTER (event_type = 'view'), count(*) FILTER (event_type = 'add_to_cart'),
    count(*) FILTER (event_type = 'purchase'),
    coalesce(sum(price) FILTER (event_type = 'purchase'), 0)::DECIMAL(22, 2)"""


def _funnel(unit: str) -> str:
    return f"""
        SELECT date_trunc('{unit}', event_time), date_trunc('{unit}', event_time) + INTERVAL 1 {unit}, product_id,
               last(product_category ORDER BY event_time, product_category), {COUNTS},
               count(DISTINCT user_id), count(DISTINCT session_id), max(event_time)
        FROM event GROUP BY 1, 2, 3"""


# A row is the table's, without its date.
ORACLES = {
    "gold.product_funnel_1m": _funnel("minute"),
    "gold.product_funnel_1h": _funnel("hour"),
    "gold.conversion_1h": f"""
        WITH by_value AS (
            SELECT *, 'category' AS dimension, product_category AS value FROM event
            UNION ALL SELECT *, 'device', device_type FROM event),
        hours AS (
            SELECT *, date_trunc('hour', event_time) AS hour, user_id || '/' || session_id AS session FROM by_value),
        bought AS (
            SELECT DISTINCT hour, dimension, value, session, true AS bought FROM hours WHERE event_type = 'purchase')
        SELECT hour, hour + INTERVAL 1 HOUR, dimension, value, {COUNTS},
               count(DISTINCT session) FILTER (event_type = 'view') AS seen,
               count(DISTINCT session) FILTER (event_type = 'view' AND bought) AS converted,
               count(*) FILTER (event_type = 'purchase') / nullif(count(*) FILTER (event_type = 'view'), 0),
               converted / nullif(seen, 0)
        FROM hours LEFT JOIN bought USING (hour, dimension, value, session) GROUP BY 1, 2, 3, 4""",
    # Without numbering: an event begins a visit when there is none before it for half an hour, and belongs to the
    # visit that began last.
    "gold.sessions": f"""
        WITH visit AS (
            SELECT user_id, session_id, event_time AS start FROM event e WHERE NOT EXISTS (
                SELECT 1 FROM event b WHERE b.user_id = e.user_id AND b.session_id = e.session_id
                AND b.event_time > e.event_time - INTERVAL 30 MINUTE
                AND (b.event_time < e.event_time OR b.event_time = e.event_time AND b.event_id < e.event_id)))
        SELECT start, max(event_time), e.user_id, e.session_id, first(device_type ORDER BY event_time, event_id),
               count(*), {COUNTS},
               CASE max(CASE event_type WHEN 'purchase' THEN 3 WHEN 'add_to_cart' THEN 2 ELSE 1 END)
                    WHEN 3 THEN 'purchase' WHEN 2 THEN 'cart' ELSE 'view' END,
               (epoch_us(max(event_time)) - epoch_us(start)) / 1000000,
               first(product_id ORDER BY event_time, event_id), last(product_id ORDER BY event_time, event_id)
        FROM event e ASOF JOIN visit v
             ON e.user_id = v.user_id AND e.session_id = v.session_id AND e.event_time >= v.start
        WHERE event_time < start + INTERVAL 24 HOUR GROUP BY start, e.user_id, e.session_id""",
}
