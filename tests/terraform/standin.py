"""What stands in for AWS in these tests, and where things are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = Path("/opt/tf-plugins")
DEBIAN = "ami-0123456789abcdef0"
SERVER = """
import sys
from moto.ec2.models.security_groups import SecurityGroupRule
from moto.iam.access_control import PermissionResult
from moto.s3.models import FakeBucket
from moto.server import main
# It keeps the description of a rule that names another group, and does not say it.
SecurityGroupRule.description = property(lambda r: r.ip_range.get("Description") or r.source_group.get("Description"))
# It takes a denial on a condition (what comes without TLS) for one of everything.
FakeBucket.get_permission = lambda *_: PermissionResult.NEUTRAL
sys.argv = ["moto_server", "-H", "127.0.0.1", "-p", sys.argv[1]]
main()
"""
