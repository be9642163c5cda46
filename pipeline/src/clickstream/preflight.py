"""Checks the settings of the streams and jobs without Spark, so that the role can do it on the control node.

    python -m clickstream.preflight '{"lake_uri": "file:///var/lib/lake", "alert_min_views": 50}'

Takes the settings as JSON, each name without CLICKSTREAM_. Prints what is wrong, a line each, and nothing when all is
well; ends with 0 either way.
"""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from clickstream.detector import Parameters
from clickstream.limits import Limits, NotifyLimits, ParameterError, QualityLimits
from clickstream.settings import PREFIX, Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LIMITS: tuple[type[Limits], ...] = (Parameters, NotifyLimits, QualityLimits)
KNOWN = (
    *(PREFIX + field.name.upper() for field in fields(Settings)),
    *(kind.prefix + field.name.upper() for kind in LIMITS for field in fields(kind)),
)


def problems(values: Mapping[str, Any]) -> list[str]:
    """One line for each wrong setting, as far as they can be told at once; each names the setting and the fix."""
    env = {PREFIX + name.upper(): str(value) for name, value in values.items()}
    found = []
    # Without what all names have in common, which would make any two of them alike.
    short = [known.removeprefix(PREFIX) for known in KNOWN]
    for name in sorted(set(env) - set(KNOWN)):
        near = difflib.get_close_matches(name.removeprefix(PREFIX), short, n=1)
        fix = f"did you mean {PREFIX}{near[0]}?" if near else f"the names are {', '.join(KNOWN)}"
        found.append(f"{name} is no setting of the package; {fix}")
    readers: list[Callable[[Mapping[str, str]], object]] = [Settings.from_env, *(kind.from_env for kind in LIMITS)]
    for check in readers:
        try:
            check(env)
        except (SettingsError, ParameterError) as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    print("\n".join(problems(json.loads(sys.argv[1]))))
