"""``pyllmlite new-plugin NAME``: a plugin package that works, to change into your own."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=69"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "A scheduler for pyllmlite."
requires-python = ">=3.10"
dependencies = ["pyllmlite"]

[project.optional-dependencies]
test = ["pytest"]

# This line is the whole registration: pyllmlite imports the module and asks its hooks.
[project.entry-points.pyllmlite]
$name = "$module"

[tool.setuptools]
packages = ["$module"]
""",
    "$module/__init__.py": '''\
"""What this package brings to pyllmlite: one function a hook, each returning classes."""

from pyllmlite.hooks.specs import hookimpl

from $module.scheduler import $cls


@hookimpl
def pyllmlite_schedulers():
    return [$cls]
''',
    "$module/scheduler.py": '''\
"""A scheduler: who runs in this step, and with how many tokens."""

from pyllmlite.core.request import Sequence, Status
from pyllmlite.hooks.scheduler import Scheduler, ScheduleStep


class $cls(Scheduler):
    """Short prompts first, so that a long one does not hold them up; each second of waiting
    counts as much as 100 tokens, so that the long one gets its turn.
    """

    name = "$name"
    contract_version = 0
    priority = -1  # taken only when asked for: LLM(scheduler="$name")

    def schedule(self, step: ScheduleStep) -> None:
        preempted = False
        for seq in step.running:
            if seq.status is not Status.RUNNING:
                continue  # preempted just now
            while step.run(seq) == 0 and step.blocked_by_cache(seq):
                last = step.running[-1]  # started last: it has the least to compute again
                step.preempt(last)
                preempted = True
                if last is seq:
                    break
        if preempted:
            return
        for seq in sorted(step.waiting, key=lambda s: self.urgency(s, step.now)):
            if step.run(seq) == 0 and step.blocked_by_cache(seq):
                return

    @staticmethod
    def urgency(seq: Sequence, now: float) -> float:
        return seq.num_uncomputed - 100 * (now - seq.request.arrival_time)
''',
    "tests/test_$module.py": '''\
"""The contract's own conformance suite, and what makes this scheduler what it is."""

from pyllmlite.testing import SchedulerConformance

from $module import $cls


class Test$cls(SchedulerConformance):
    strategy = $cls
''',
    "README.md": """\
# $distribution

A scheduler for [pyllmlite](https://pypi.org/project/pyllmlite/).

```sh
pip install -e ".[test]"
pytest                                      # the conformance suite
pyllmlite plugins                           # lists it, with this package's version
pyllmlite run "Hello" --scheduler $name
```

`$module/scheduler.py` is the class to change; `$module/__init__.py` registers it. To bring an
attention, a cache, a quantizer or a decoder, add the hook of that name there.
""",
}


def words(name: str) -> dict[str, str]:
    """The names that follow from one: strategy, distribution, module, class.

    Raises:
        PluginError: It cannot be all of these.
    """
    import keyword

    from pyllmlite.core.errors import PluginError

    plain = name.lower().replace("_", "-").removeprefix("pyllmlite-")
    module = "pyllmlite_" + plain.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", plain) or keyword.iskeyword(plain):
        raise PluginError(
            f"{name!r} cannot name a plugin: lower-case letters, digits and single '-', "
            "a letter first (shortest-first)"
        )
    return {
        "name": plain,
        "distribution": f"pyllmlite-{plain}",
        "module": module,
        "cls": "".join(part.capitalize() for part in plain.split("-")) + "Scheduler",
    }


def new_plugin(
    name: Annotated[str, typer.Argument(help="Of the strategy: shortest-first.")],
    directory: Annotated[
        Path | None,
        typer.Option(help="Where to put it; a folder of the package's name if not given."),
    ] = None,
) -> None:
    """Write a plugin package that works, with its tests."""
    from pyllmlite.core.errors import PluginError

    names = words(name)
    target = directory or Path(names["distribution"])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PluginError(f"{target} is there already; nothing was written")
    for path, text in FILES.items():
        file = target / Template(path).substitute(names)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(names), encoding="utf-8")
    print(f"{target}: a scheduler called {names['name']!r}, with its tests")
    print(f"  cd {target} && pip install -e . && pytest")
