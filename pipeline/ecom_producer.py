#!/usr/bin/env python3
"""Sends simulated e-commerce events to Kafka: `python ecom_producer.py`, or with --help for the options."""

import sys
from pathlib import Path

try:
    from clickstream.producer import main
except ModuleNotFoundError as error:
    if error.name != "clickstream":
        raise
    # run from a checkout, without the package installed
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    from clickstream.producer import main

if __name__ == "__main__":
    sys.exit(main())
