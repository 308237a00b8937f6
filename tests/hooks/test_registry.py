"""The registry with made-up distributions: what is found, what is refused, and how it is said."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import types
from importlib import metadata

import pytest

import pyllmlite
from pyllmlite.core.errors import PluginError
from pyllmlite.hooks import registry as registry_module
from pyllmlite.hooks.registry import Registry
from pyllmlite.hooks.scheduler import Scheduler
from pyllmlite.hooks.specs import hookimpl

GOOD = """
    from pyllmlite import Scheduler, hookimpl

    class Fair(Scheduler):
        name = "{name}"
        def schedule(self, step):
            pass

    @hookimpl
    def pyllmlite_schedulers():
        return [Fair]
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(distribution, module, source)``: a distribution with one entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    added = []

    def add(distribution, module, source, version="1.2", entry_points=None):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        points = entry_points or {module: module}
        lines = [f"{name} = {target}" for name, target in points.items()]
        info.joinpath("entry_points.txt").write_text("[pyllmlite]\n" + "\n".join(lines) + "\n")
        added.append(module)

    yield add
    for module in added:
        sys.modules.pop(module, None)


# Plugins that happen to be installed beside the built-in ones stay out of these tests.
OTHERS = {
    point.dist.metadata["Name"] for point in metadata.entry_points(group="pyllmlite")
} - {"pyllmlite"}


def found(disable=()):
    registry = Registry()
    registry.discover([*disable, *OTHERS])
    return registry


def lines(registry):
    return [problem.line for problem in registry.problems]


def module(**hooks):
    plugin = types.ModuleType("made_up")
    for name, classes in hooks.items():

        def bring(classes=classes):
            return classes

        bring.__name__ = name
        setattr(plugin, name, hookimpl(bring))
    return plugin


class Works(Scheduler):
    """Does nothing."""

    name = "works"

    def schedule(self, step):
        pass


def test_built_ins_are_found_through_the_entry_points():
    registry = found()
    assert not lines(registry)
    assert {"flash", "reference"} <= set(registry.names("attention"))
    assert {"contiguous", "paged"} <= set(registry.names("cache"))
    assert {"none", "rtn"} <= set(registry.names("quantizer"))
    assert {"continuous", "static"} <= set(registry.names("scheduler"))
    assert "sample" in registry.names("decoder", "selector")
    entry = registry.entry("scheduler", "static")
    assert entry.distribution == "pyllmlite" and entry.version == pyllmlite.__version__


def test_third_party_is_found_with_distribution_and_version(install):
    install("llm-fair", "llm_fair", GOOD.format(name="fair"))
    registry = found()
    entry = registry.entry("scheduler", "fair")
    assert (entry.distribution, entry.version) == ("llm-fair", "1.2")
    assert not lines(registry)
    chosen = registry.select("scheduler", "fair", None)
    assert (chosen.name, chosen.distribution) == ("fair", "llm-fair")
    assert chosen.why == "asked for by name"


def test_import_error_is_one_line_and_takes_nobody_down(install, caplog):
    install("broken-one", "broken_one", "import a_module_that_is_not_there")
    install("llm-fair", "llm_fair", GOOD.format(name="fair"))
    with caplog.at_level(logging.WARNING, "pyllmlite"):
        registry = found()
    (line,) = lines(registry)
    assert "broken-one 1.2" in line and "a_module_that_is_not_there" in line
    assert "\n" not in line and "Traceback" not in line
    assert [r.message for r in caplog.records] == [line]
    assert {"fair", "continuous"} <= set(registry.names("scheduler"))
    # It may have brought what somebody asks for: the refusal says so.
    with pytest.raises(PluginError, match="broken-one 1.2"):
        registry.get("scheduler", "unheard-of")


@pytest.mark.parametrize("source", ["raise SystemExit(3)", "def f(:\n  pass", "1 / 0"])
def test_whatever_an_import_raises(install, source):
    install("broken-one", "broken_one", source)
    (line,) = lines(found())
    assert "broken-one" in line and "cannot be imported" in line and "\n" not in line


def test_taken_name_names_both_distributions(install):
    install("llm-other", "llm_other", GOOD.format(name="continuous"))
    registry = found()
    (line,) = lines(registry)
    assert "llm-other 1.2" in line and "pyllmlite" in line and "'continuous'" in line
    assert registry.entry("scheduler", "continuous").distribution == "pyllmlite"


def test_taken_name_between_third_parties_does_not_depend_on_the_path(install):
    install("b-plugin", "b_plugin", GOOD.format(name="fair"))
    install("a-plugin", "a_plugin", GOOD.format(name="fair"))
    registry = found()
    assert registry.entry("scheduler", "fair").distribution == "a-plugin"
    (line,) = lines(registry)
    assert "b-plugin" in line and "a-plugin" in line


def test_same_name_under_two_contracts_is_no_conflict():
    registry = Registry()
    registry.register(module(pyllmlite_schedulers=[Works]))

    class Sample(pyllmlite.Decoder):
        name = "works"

        def advance(self, seq, result, actions):
            pass

    other = module(pyllmlite_decoders=[Sample])
    registry.register(other, name="other")
    assert not lines(registry)
    assert registry.get("decoder", "works", "selector") is Sample
    with pytest.raises(PluginError, match="is a selector, not a proposer"):
        registry.get("decoder", "works", "proposer")


def test_version_that_is_not_supported_says_what_to_do(monkeypatch):
    class Newer(Works):
        name = "newer"
        contract_version = 9

    registry = Registry()
    registry.register(module(pyllmlite_schedulers=[Newer]), distribution="llm-new", version="3")
    (line,) = lines(registry)
    assert "llm-new 3" in line and "version 9" in line and "upgrade pyllmlite" in line
    with pytest.raises(PluginError, match="upgrade pyllmlite"):
        registry.get("scheduler", "newer")

    monkeypatch.setitem(registry_module.CONTRACT_VERSIONS, "scheduler", 3)
    for version, accepted in [(3, True), (2, True), (1, False)]:
        cls = type("Dated", (Works,), {"name": "dated", "contract_version": version})
        registry = Registry()
        registry.register(module(pyllmlite_schedulers=[cls]))
        assert (not lines(registry)) == accepted
    assert "upgrade the plugin" in lines(registry)[0]


def test_classes_that_are_no_strategies():
    class Abstract(Scheduler):
        name = "abstract"

    words = ("", "Fair", "a b", "auto", "-x", None, 3)
    bad_names = [type("B", (Works,), {"name": word}) for word in words]
    nameless = type("Nameless", (Scheduler,), {"schedule": lambda self, step: None})
    for cls, reason in [
        (Abstract, "without schedule"),
        (int, "no subclass of Scheduler"),
        ("fair", "no subclass of Scheduler"),
        (Works(), "no subclass of Scheduler"),
        (nameless, "with name None"),
        *[(cls, "with name") for cls in bad_names],
        (type("P", (Works,), {"priority": "high"}), "no integer"),
    ]:
        registry = Registry()
        registry.register(module(pyllmlite_schedulers=[cls, Works]), distribution="llm-x")
        (line,) = lines(registry)
        assert reason in line and "llm-x" in line and "\n" not in line
        assert registry.names("scheduler") == ["works"]


def test_hooks_that_do_not_fit():
    def raises():
        raise RuntimeError("two\nlines")

    plugin = types.ModuleType("raises")
    raises.__name__ = "pyllmlite_caches"
    plugin.pyllmlite_caches = hookimpl(raises)
    registry = Registry()
    registry.register(plugin, distribution="llm-x")
    assert "pyllmlite_caches() failed: RuntimeError: two lines" in lines(registry)[0]

    registry = Registry()
    registry.register(module(pyllmlite_scheduler=[Works]), distribution="llm-x")
    assert "'pyllmlite_scheduler', which is no hook" in lines(registry)[0]
    assert "pyllmlite_schedulers" in lines(registry)[0]

    registry = Registry()
    registry.register(types.ModuleType("empty"), distribution="llm-x")
    assert "no @hookimpl function" in lines(registry)[0]

    def wants(unknown):
        return []

    plugin = types.ModuleType("wants")
    wants.__name__ = "pyllmlite_caches"
    plugin.pyllmlite_caches = hookimpl(wants)
    registry = Registry()
    registry.register(plugin, distribution="llm-x")
    assert len(lines(registry)) >= 1 and "llm-x" in lines(registry)[0]
    assert "\n" not in lines(registry)[0]


def test_unknown_names_list_the_known_and_the_nearest():
    registry = found()
    with pytest.raises(PluginError) as caught:
        registry.get("scheduler", "continous")
    text = str(caught.value)
    assert "did you mean 'continuous'?" in text and "static" in text and "\n" not in text
    with pytest.raises(PluginError, match="known: "):
        registry.select("cache", "zzz", None)
    with pytest.raises(PluginError, match="there are attention, cache"):
        registry.names("schedulers")


def test_disabled_by_distribution_or_entry_point(install):
    install("llm-fair", "llm_fair", GOOD.format(name="fair"))
    for word in ("llm-fair", "LLM_Fair", "llm_fair", " llm.fair "):
        registry = found([word])
        assert "fair" not in registry.names("scheduler")
        assert {o.distribution for o in registry.disabled} == {"llm-fair", *OTHERS}
    registry = found(["scheduler"])
    assert registry.names("scheduler") == ["fair"]
    assert "paged" in registry.names("cache")


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("PYLLMLITE_DISABLE_PLUGINS", ",".join(["decoder", "attention", *OTHERS]))
    registry = Registry.load()
    assert registry is Registry.load()
    assert not registry.names("decoder") and not registry.names("attention")
    assert registry.names("cache")
    monkeypatch.delenv("PYLLMLITE_DISABLE_PLUGINS")
    assert Registry.load().names("decoder")


def scheduler(name, priority, reason=None):
    def supports(cls, need):
        if isinstance(reason, Exception):
            raise reason
        return reason

    body = {"name": name, "priority": priority, "supports": classmethod(supports)}
    return type(name.title(), (Works,), body)


def test_auto_takes_the_highest_priority_that_supports():
    registry = Registry()
    classes = [
        scheduler("best", 90, "needs CUDA"),
        scheduler("beta", 50),
        scheduler("alpha", 50),
        scheduler("low", 1),
        scheduler("hidden", -1),
        scheduler("odd", 70, ValueError("boom")),
    ]
    registry.register(module(pyllmlite_schedulers=classes))
    for name in ("auto", None):
        chosen = registry.select("scheduler", name, None)
        assert chosen.name == "alpha" and "priority (50)" in chosen.why
        rejected = dict(chosen.rejected)
        assert rejected["best"] == "needs CUDA"
        assert rejected["hidden"] == "only by name"
        assert "boom" in rejected["odd"]
        assert set(rejected) == {"best", "beta", "low", "hidden", "odd"}
    assert registry.select("scheduler", "hidden", None).name == "hidden"
    with pytest.raises(PluginError, match="scheduler 'best' .*: needs CUDA"):
        registry.select("scheduler", "best", None)


def test_auto_without_any_that_supports_gives_all_reasons():
    registry = Registry()
    classes = [scheduler("a", 1, "no A"), scheduler("b", 2, "no B")]
    registry.register(module(pyllmlite_schedulers=classes))
    with pytest.raises(PluginError, match="b: no B; a: no A"):
        registry.select("scheduler", "auto", None)
    with pytest.raises(PluginError, match="none is installed"):
        registry.select("cache", "auto", None)


def test_a_class_may_be_given():
    registry = Registry()
    chosen = registry.select("scheduler", Works, None)
    assert chosen.cls is Works and chosen.distribution == "(given)"
    with pytest.raises(PluginError, match="no subclass of KVCache"):
        registry.select("cache", Works, None)


def test_auto_for_decoders_is_a_selector():
    class Draft(pyllmlite.Proposer):
        name = "draft"
        priority = 99

        def propose(self, seq, max_tokens):
            return []

    class Plain(pyllmlite.Decoder):
        name = "plain"

        def advance(self, seq, result, actions):
            pass

    registry = Registry()
    registry.register(module(pyllmlite_decoders=[Draft, Plain]))
    assert registry.select("decoder", "auto", None).cls is Plain
    assert registry.select("decoder", "auto", None, "proposer").cls is Draft
    assert registry.classes("decoder", "proposer") == [Draft]


def test_registered_twice_is_said():
    registry = Registry()
    plugin = module(pyllmlite_schedulers=[Works])
    registry.register(plugin, distribution="llm-x")
    registry.register(plugin, name="again", distribution="llm-x")
    assert "is registered twice" in lines(registry)[0]
    assert registry.names("scheduler") == ["works"]


def run_python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light_and_hooks_need_little():
    code = "import sys, pyllmlite; print(*[m for m in ('numpy', 'torch', 'transformers', 'pluggy', \
'importlib.metadata') if m in sys.modules])"
    assert run_python(code) == []
    code = "import sys; from pyllmlite import hookimpl, Scheduler, Registry; Registry.load(); \
print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    assert run_python(code) == []


def test_public_names():
    assert pyllmlite.Scheduler is Scheduler and pyllmlite.hookimpl is hookimpl
    assert "LLM" in dir(pyllmlite)
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        pyllmlite.LLMM  # noqa: B018
