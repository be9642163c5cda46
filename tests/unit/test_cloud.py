"""`cloud`, where it asks nobody."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cloud() -> Any:
    loader = SourceFileLoader("cloud", str(ROOT / "ansible/scripts/cloud"))
    spec = importlib.util.spec_from_loader("cloud", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_what_aws_does_not_do_is_said(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens there."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    lake = cloud.Lake({f"{cloud.LAKE}.aws_s3_bucket.this": {"bucket": "lake", "region": "us-east-1"}})
    for ask in (lake.refuse_data, lake.delete):
        with pytest.raises(cloud.CloudError, match=r"endpoint URL.*; correct that and run this again"):
            ask()


def test_what_is_not_there_is_not_asked_for(cloud: Any) -> None:
    lake = cloud.Lake({})
    lake.refuse_data()
    lake.delete()
    assert not lake.holds("s3a://lake/lake")


def test_an_operators_own_configuration_of_terraform_stays(
    cloud: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, plugins = tmp_path / "own.rc", tmp_path / "plugins"
    (plugins / "registry.terraform.io/hashicorp/aws").mkdir(parents=True)
    own.touch()
    monkeypatch.setattr(cloud, "PLUGINS", plugins)
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(own))
    assert cloud.terraform_environment(tmp_path)["TF_CLI_CONFIG_FILE"] == str(own)

    # Without one, what is here is taken from here and all else from where it is.
    own.unlink()
    text = Path(cloud.terraform_environment(tmp_path)["TF_CLI_CONFIG_FILE"]).read_text()
    assert text.count('["registry.terraform.io/hashicorp/aws"]') == 2
    assert "direct {" in text
