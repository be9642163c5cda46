"""What spark-submit runs: the `clickstream` command as a Spark application."""

import sys

from clickstream.cli import main

if __name__ == "__main__":
    sys.exit(main())
