"""PostgreSQL keeps rows, and lets in whom it should and nobody else."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from testinfra.backend.base import CommandResult
from testinfra.host import Host

SECRETS = Path(__file__).parents[1] / "inventory/secrets"


def psql(host: Host, address: str, user: str, statement: str, database: str = "", password: str = "") -> CommandResult:
    """Run a statement over TCP, as a service would, with the password that the deployment made."""
    password = password or (SECRETS / f"postgres_{user}").read_text().strip()
    command = "PGPASSWORD=%s psql -X -v ON_ERROR_STOP=1 -At -h %s -U %s -d %s -c %s"
    return host.run(command, password, address, user, database or user, statement)


@pytest.mark.parametrize("user", ["airflow", "analytics"])
def test_a_row_is_committed_and_outlives_a_restart(host: Host, address: str, user: str) -> None:
    made = psql(host, address, user, "CREATE TABLE IF NOT EXISTS molecule AS SELECT 42 AS answer")
    assert made.rc == 0, made.stderr
    host.check_output("nodectl restart postgresql")
    assert psql(host, address, user, "SELECT answer FROM molecule").stdout.strip() == "42"
    assert psql(host, address, user, "DROP TABLE molecule").rc == 0


@pytest.mark.parametrize("user", ["airflow", "analytics"])
def test_a_wrong_password_is_refused(host: Host, address: str, user: str) -> None:
    refused = psql(host, address, user, "SELECT 1", password="wrong")
    assert refused.rc == 2
    assert "password authentication failed" in refused.stderr


def test_a_user_cannot_enter_the_others_database(host: Host, address: str) -> None:
    refused = psql(host, address, "analytics", "SELECT 1", database="airflow")
    assert refused.rc == 2
    assert "permission denied for database" in refused.stderr


def test_the_superuser_is_not_reachable_by_network(host: Host, address: str) -> None:
    refused = psql(host, address, "postgres", "SELECT 1", password="postgres")
    assert refused.rc == 2


def test_passwords_are_kept_as_scram_and_users_own_no_more_than_their_database(host: Host) -> None:
    statement = (
        "SELECT rolname, left(rolpassword, 13), rolsuper OR rolcreatedb OR rolcreaterole "
        "FROM pg_authid WHERE rolcanlogin AND rolname <> 'postgres' ORDER BY 1"
    )
    rows = host.check_output("cd / && runuser -u postgres -- psql -X -At -c %s", statement).splitlines()
    assert rows == ["airflow|SCRAM-SHA-256|f", "analytics|SCRAM-SHA-256|f", "dashboards|SCRAM-SHA-256|f"]
    owners = host.check_output(
        "cd / && runuser -u postgres -- psql -X -At -c %s",
        "SELECT datname, pg_get_userbyid(datdba) FROM pg_database WHERE datname IN ('airflow', 'analytics') ORDER BY 1",
    )
    assert owners.splitlines() == ["airflow|airflow", "analytics|analytics"]


def test_a_reader_reads_what_the_owner_makes_and_writes_nothing(host: Host, address: str) -> None:
    def ask(statement: str, user: str = "dashboards", database: str = "analytics") -> CommandResult:
        return psql(host, address, user, statement, database)

    # Made after the deployment, as the streams do.
    made = ask("CREATE SCHEMA molecule; CREATE TABLE molecule.mart AS SELECT 42 AS answer", user="analytics")
    assert made.rc == 0, made.stderr
    read = ask("SELECT answer FROM molecule.mart")
    assert read.stdout.strip() == "42", read.stderr
    for statement in (
        "DELETE FROM molecule.mart",
        "INSERT INTO molecule.mart VALUES (1)",
        "CREATE TABLE molecule.mine (x int)",
        "CREATE SCHEMA mine",
        "CREATE TEMP TABLE mine (x int)",
        "SELECT rolpassword FROM pg_authid",
    ):
        refused = ask(statement)
        assert refused.rc != 0 and "permission denied" in refused.stderr, (statement, refused.stderr)
    assert "permission denied for database" in ask("SELECT 1", database="airflow").stderr
    assert ask("DROP SCHEMA molecule CASCADE", user="analytics").rc == 0


def test_rules_that_were_written_and_not_read_are_read_by_the_next_run(host: Host) -> None:
    def apply() -> dict[str, object]:
        return dict(json.loads(host.check_output("nodectl apply postgresql")))

    loaded = "cd / && runuser -u postgres -- psql -X -At -c 'SELECT pg_conf_load_time()'"
    assert apply()["action"] == "none"
    before = host.check_output(loaded)
    host.check_output("touch /etc/postgresql/*/main/pg_hba.conf")
    assert apply()["action"] == "reload"
    assert host.check_output(loaded) > before
    assert apply()["changed"] is False


def test_postgresql_is_shut_in_and_bounded(host: Host) -> None:
    unit = json.loads(host.check_output("nodectl list --json"))["services"][0]["unit"]
    pid = host.check_output("systemctl show --property MainPID --value %s", unit)
    assert host.run("nsenter --target %s --mount -- touch /etc/molecule", pid).rc != 0, "it may write to /etc"
    assert host.check_output("grep NoNewPrivs /proc/%s/status", pid).split() == ["NoNewPrivs:", "1"]
    said = host.check_output("systemctl show --property MemoryMax,OOMPolicy %s", unit).split()
    assert set(said) == {f"MemoryMax={2**30}", "OOMPolicy=continue"}


def test_a_check_says_what_an_edit_would_change_and_changes_nothing(host: Host) -> None:
    users = [{"name": "auditor", "password": "not-a-password-of-anybody"}]
    databases = [{"name": "audit", "owner": "auditor", "readers": ["auditor"]}]
    project = Path(__file__).parents[3]
    edit = json.dumps({"postgres_users": users, "postgres_databases": databases})
    done = subprocess.run(
        ["ansible-playbook", "-i", SECRETS.parent, "ansible/playbooks/site.yml", "--check", "-e", edit],
        cwd=project,
        env=os.environ | {"ANSIBLE_CONFIG": str(project / "ansible/ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for task in ("Make the users", "Make the databases"):
        assert f"TASK [postgres : {task}]" in done.stdout
    assert " changed=2 " in done.stdout, done.stdout
    known = host.check_output("cd / && runuser -u postgres -- psql -X -At -c %s", "SELECT rolname FROM pg_roles")
    assert "analytics" in known.split()
    assert "auditor" not in known.split()
