"""The clickstream platform's producer, streams and bounded jobs."""

__version__ = "0.1.0"
