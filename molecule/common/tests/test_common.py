"""The base of every node: trust, names, a bounded journal, nodectl."""

from __future__ import annotations

import json

import pytest
from testinfra.host import Host

SUBJECT = "Clickstream test CA"


def test_openssl_trusts_the_sites_ca(host: Host) -> None:
    found = host.check_output("openssl storeutl -noout -text -certs /etc/ssl/certs/ca-certificates.crt")
    assert f"CN={SUBJECT}" in found.replace("CN = ", "CN=")


def test_python_trusts_the_sites_ca(host: Host) -> None:
    script = "import ssl; print(ssl.create_default_context().get_ca_certs())"
    assert SUBJECT in host.check_output("python3 -c %s", script)


def test_the_journal_survives_a_reboot_and_is_bounded(host: Host) -> None:
    # What journald itself says about the limits it keeps.
    said = host.check_output("journalctl --boot --unit systemd-journald --output cat --no-pager")
    assert "System Journal (/var/log/journal/" in said
    assert "max 500M" in said


def test_the_node_knows_its_own_address(host: Host, address: str) -> None:
    assert host.check_output("getent ahostsv4 $(hostname)").split()[0] == address


def test_nodectl_tells_a_healthy_service_from_a_broken_one(host: Host) -> None:
    entry = json.dumps({"name": "probe", "unit": "ssh.service", "health_timeout": 1})
    try:
        host.check_output("printf %%s %s >/etc/nodectl/services.d/probe.json", entry)
        host.check_output("printf '#!/bin/sh\\necho it works\\n' >/usr/local/lib/nodectl/probe")
        host.check_output("chmod 0755 /usr/local/lib/nodectl/probe")
        assert "it works" in host.check_output("nodectl health probe")
        (probe,) = json.loads(host.check_output("nodectl status --json"))["services"]
        assert (probe["state"], probe["healthy"]) == ("active", True)

        host.check_output("printf '#!/bin/sh\\necho it is broken >&2\\nexit 1\\n' >/usr/local/lib/nodectl/probe")
        broken = host.run("nodectl status")
        assert broken.rc == 1
        assert "it is broken" in broken.stdout + broken.stderr
    finally:
        host.run("rm -f /etc/nodectl/services.d/probe.json /usr/local/lib/nodectl/probe")


@pytest.mark.parametrize(
    ("program", "sub", "action"),
    [("/bin/sleep 300", "start", "none"), ("/bin/false", "auto-restart", "start")],
    ids=["still starting", "in a crash loop"],
)
def test_nodectl_starts_only_what_does_not_start_by_itself(host: Host, program: str, sub: str, action: str) -> None:
    unit = f"[Service]\nType=notify\nExecStart={program}\nRestart=on-failure\nRestartSec=300\n"
    entry = json.dumps({"name": "slow", "unit": "slow.service"})
    show = "systemctl show --value -p SubState -p MainPID slow"
    try:
        host.check_output("printf %%s %s >/run/systemd/system/slow.service", unit)
        host.check_output("printf %%s %s >/etc/nodectl/services.d/slow.json", entry)
        host.check_output("systemctl daemon-reload && systemctl start --no-block slow && sleep 1")
        before = host.check_output(show)
        assert sub in before.split()
        assert json.loads(host.check_output("nodectl apply slow --check"))["action"] == action
        assert host.check_output(show) == before
        if action == "none":
            assert json.loads(host.check_output("nodectl apply slow"))["healthy"] is False
            assert host.check_output(show) == before
    finally:
        host.run("rm -f /etc/nodectl/services.d/slow.json /run/systemd/system/slow.service")
        host.run("systemctl stop slow; systemctl daemon-reload")


def test_a_container_has_no_disks(host: Host) -> None:
    assert not host.file("/srv/none").exists
