"""Checks with ast that no file executes what it reads; exceptions are listed with the reason.

Names are followed through `import ... as` and `from ... import`, and a forbidden name need not be
called to be found. The rule is applied to snippets that break it as well, so that one which went
blind is noticed.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.paths import REPO

AREAS = ("megatron", "moe_ext", "moe_app", "tools", "examples", "benchmarks", "tests", "docker")

BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {
    # Runs text as a program or a command line.
    *BUILTINS,
    *("runpy.run_path", "code.interact", "os.system", "os.popen"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    # Unpickling runs code.
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler"),
    *("_pickle.load", "_pickle.loads", "_pickle.Unpickler", "shelve.open", "pandas.read_pickle"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load"),
    *("marshal.load", "marshal.loads"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    # YAML tags construct objects.
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.full_load", "yaml.full_load_all", "yaml.Loader", "yaml.UnsafeLoader"),
    *("yaml.FullLoader", "yaml.CLoader", "yaml.CUnsafeLoader", "yaml.CFullLoader"),
    # Templates are programs.
    *("jinja2.Environment", "jinja2.Template", "jinja2.sandbox", "apply_chat_template"),
    *("render_jinja_template", "_compile_jinja_template"),
    # File names that are predictable or chosen by others.
    *("extractall", "tempfile.mktemp"),
    # Creates private files whatever the umask.
    *("tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
}
KEYWORDS = {
    "shell": False,
    "allow_pickle": False,
    "weights_only": True,
    "trust_remote_code": False,
}
"""Keywords, and dict keys, that may have one value alone, written out."""
MUST_SAY = {"torch.load": "weights_only", "numpy.load": "allow_pickle"}

ALLOWED: dict[str, dict[str, str]] = {
    "megatron/trainer/checkpoint/safe_load.py": {
        "pickle._Unpickler": "the guard; it builds what is listed"
    },
    "moe_app/chat/render_worker.py": {
        "_compile_jinja_template": "a process of its own, with limits, in transformers' sandbox",
        "render_jinja_template": "the same",
    },
    "moe_app/evaluate/execution/boot.py": {
        "compile": "a generated program, in the sandbox, within limits",
        "exec": "the same",
    },
    "examples/adapt_tiny/chat.py": {
        "apply_chat_template": "the template of an export that the demo has just made"
    },
    # Tests that compare with transformers.
    "tests/unit/app/chat/make_chat.py": {"apply_chat_template": "the tests' and the project's own"},
    "tests/unit/app/chat/test_jinja_template.py": {"apply_chat_template": "the test's templates"},
    "tests/unit/app/chat/test_templates.py": {"apply_chat_template": "the project's templates"},
    "tests/unit/app/convert/test_export_chat_template.py": {
        "apply_chat_template": "the project's templates, exported"
    },
    "tests/unit/app/infer/test_chat_answers.py": {"apply_chat_template": "the same"},
    # Tests that prove a payload is live, or read back what they wrote.
    "tests/distributed/test_hostile_checkpoint.py": {
        "allow_pickle not False": "payloads in an index cache",
        "os.system": "what the payload calls",
        "pickle.loads": "metadata of its own run, and payloads",
        "weights_only not True": "payloads",
        "yaml.unsafe_load": "a payload",
    },
    "tests/unit/trainer/checkpoint/test_stream.py": {"os.system": "what the payload calls"},
    "tests/unit/trainer/data/test_build.py": {"allow_pickle not False": "a payload is written"},
    "tests/unit/trainer/checkpoint/test_safe_load.py": {
        "os.system": "what the payload calls",
        "pickle.load": "a payload",
        "weights_only not True": "payloads",
    },
    "tests/unit/app/convert/test_security_hf.py": {
        "jinja2.Environment": "a payload, and a trap",
        "trust_remote_code not False": "a field of a hostile file",
    },
    "tests/unit/trainer/test_security_text.py": {"yaml.unsafe_load": "a payload"},
    "tests/recipes/test_earlier_run.py": {"extractall": "the repository's own archive"},
    "tests/unit/trainer/test_compat.py": {"extractall": "the repository's own archive"},
    "tests/distributed/fork_server.py": {"runpy.run_path": "a test's own worker"},
    "tests/unit/trainer/runtime/cpu_backend_worker.py": {
        "eval": "expressions of its own test",
        "exec": "the same",
    },
    "tests/unit/trainer/health/test_watchdog.py": {
        "compile": "a function of the test's own in another file",
        "exec": "the same",
    },
}


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """Return `a.b.c` with its first name resolved by imports, "" for other expressions."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, known)
        return f"{owner}.{node.attr}" if owner else f".{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Map the names that a file imports, anywhere, to what they refer to."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {each.asname: each.name for each in node.names if each.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return known


def use(name: str, line: int) -> Iterator[tuple[int, str]]:
    """Yield the entry of FORBIDDEN that a dotted name equals or, unless a builtin, ends in."""
    last = name.rpartition(".")[2]
    for found in {name, last} & FORBIDDEN:
        if found == name or found not in BUILTINS:
            yield line, found


def problems(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of every forbidden use."""
    tree = ast.parse(text)
    known = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                yield from use(f"{node.module}.{each.name}", node.lineno)
        elif isinstance(node, ast.Attribute | ast.Name):
            yield from use(dotted(node, known), node.lineno)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in KEYWORDS:
                    yield from other_value(str(key.value), value)
        elif isinstance(node, ast.Call):
            yield from call_problems(node, dotted(node.func, known))


def call_problems(call: ast.Call, name: str) -> Iterator[tuple[int, str]]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for keyword in KEYWORDS.keys() & given.keys():
        yield from other_value(keyword, given[keyword])
    needed = MUST_SAY.get(name)
    if needed is not None and needed not in given:
        yield call.lineno, f"{name} without {needed}"


def other_value(name: str, value: ast.expr) -> Iterator[tuple[int, str]]:
    if not isinstance(value, ast.Constant) or value.value is not KEYWORDS[name]:
        yield value.lineno, f"{name} not {KEYWORDS[name]}"


VULNERABLE = {
    "megatron-core": "0.15.2",
    "sentencepiece": "0.2.1",
    "torch": "2.9.1",
    "transformers": "5.2.0",
}
"""The newest release of each package that has a known hole which a newer one closes."""


def test_minimum_versions_exclude_known_vulnerabilities() -> None:
    text = (REPO / "pyproject.toml").read_text("utf-8")
    listed = [Requirement(each) for each in re.findall(r'"([a-z][\w-]+>=[^"]+)"', text)]
    found = {each.name: each.specifier for each in listed if each.name in VULNERABLE}
    assert found.keys() == VULNERABLE.keys()
    for name, version in VULNERABLE.items():
        assert not found[name].contains(version), name


def files() -> list[Path]:
    found = [path for area in AREAS for path in (REPO / area).rglob("*.py")]
    return sorted([*found, REPO / "setup.py"])


def test_nothing_executes_what_it_reads_but_what_is_listed() -> None:
    paths = files()
    assert len(paths) > 150
    unknown, used = [], set()
    for path in paths:
        where = str(path.relative_to(REPO))
        allowed = ALLOWED.get(where, {})
        for line, name in problems(path.read_text("utf-8")):
            used.add((where, name))
            if name not in allowed:
                unknown.append(f"{where}:{line}: {name}")
    assert not unknown, "\n".join(unknown)
    listed = {(where, name) for where, names in ALLOWED.items() for name in names}
    assert listed == used, "exceptions that nothing needs any more"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pickle\npickle.load(file)", "pickle.load"),
        ("import pickle as p\nread = p.loads", "pickle.loads"),
        ("from pickle import load as read", "pickle.load"),
        ("import pickle\nclass A(pickle.Unpickler): ...", "pickle.Unpickler"),
        ("import numpy as np\nnp.load(path)", "numpy.load without allow_pickle"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle not False"),
        ("read(path, allow_pickle=flag)", "allow_pickle not False"),
        ("import torch\ntorch.load(path)", "torch.load without weights_only"),
        ("from torch import load\nload(path)", "torch.load without weights_only"),
        ("torch.load(path, weights_only=False)", "weights_only not True"),
        ("import yaml\nyaml.load(text, Loader=any)", "yaml.load"),
        ("from yaml import UnsafeLoader", "yaml.UnsafeLoader"),
        ("eval(text)", "eval"),
        ("run = exec", "exec"),
        ("compile(text, '', 'exec')", "compile"),
        ("import subprocess\nsubprocess.run(command, shell=True)", "shell not False"),
        ("from os import system", "os.system"),
        ("import os\nos.popen(command)", "os.popen"),
        ("from_pretrained(name, trust_remote_code=True)", "trust_remote_code not False"),
        ("options = {'trust_remote_code': trusted}", "trust_remote_code not False"),
        ("import jinja2\njinja2.Environment()", "jinja2.Environment"),
        ("tokenizer.apply_chat_template(turns)", "apply_chat_template"),
        ("archive.extractall()", "extractall"),
    ],
)
def test_the_rule_finds_what_breaks_it(text: str, name: str) -> None:
    assert name in [found for _, found in problems(text)]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.dump(value, file)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile(text)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['true'], shell=False)",
        "options = {'trust_remote_code': False}",
        "text = 'pickle.load'",
    ],
)
def test_the_rule_lets_the_harmless_pass(text: str) -> None:
    assert list(problems(text)) == []
