"""`finectl init` for a whole family: its members, their order, what they start from, and what interrupts it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import Ran, child_environment, command_line, run_cli, weights

from finectl.errors import EXIT_INPUT, EXIT_INTERRUPTED, EXIT_SAVED, EXIT_USAGE
from finectl.initializers import METHODS

SHORT = ("--tune-steps", 2, "--batch-size", 8, "--tune-samples", 16)
NANO = ("--model", "dit-nano")


def family(*options: object, code: int = 0, **more: Any) -> Ran:
    ran = run_cli("init", *options, *SHORT, **more)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    return ran


def single(*options: object) -> Path:
    return run_cli("init", *options, *SHORT).path


def names(ran: Ran) -> list[str]:
    """Return the members' names without the recipe's hash."""
    return [Path(line).name.rsplit("-", 1)[0] for line in ran.out.splitlines()]


def members(ran: Ran) -> list[str]:
    """Return the members as stderr names them."""
    return [line.rpartition(": ")[2] for line in ran.err.splitlines() if " of " in line and line.count(":") == 2]


def test_each_member_is_the_artifact_of_the_single_command(chain: Any) -> None:
    sources = (chain.learngene, chain.model)
    ran = family(*sources, "--method", "weight-selection,fine,he", "--depths", "4,2")
    alone = [
        single(source, "--method", method, "--depth", depth)
        for method, source in (("fine", sources[0]), ("he", sources[0]), ("weight-selection", sources[1]))
        for depth in (4, 2)
    ]
    assert ran.out.splitlines() == [str(path) for path in alone]
    again = family(*sources, "--method", "weight-selection,fine,he", "--depths", "4,2")
    assert again.out == ran.out and again.err.count("already there") == 6


def test_the_first_input_of_a_kind_is_taken_and_the_others_are_named(chain: Any) -> None:
    ran = family(chain.model, chain.learngene, chain.init, "--method", "he,svd,fine", "--depth", 2, "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    recorded = [yaml.safe_load((Path(line["path"]) / "manifest.yaml").read_text())["parents"][0] for line in lines]
    assert [Path(parent["path"]).name for parent in recorded] == [
        chain.learngene.name,
        chain.model.name,
        chain.model.name,
    ]
    assert f"no method takes {chain.init}" in ran.err
    assert all(line["cached"] is False and line["kind"] == "model" for line in lines)


def test_inputs_come_through_a_pipe(chain: Any) -> None:
    named = family(chain.learngene, chain.model, "--method", "fine,svd", "--depths", 2)
    piped = family("-", "--method", "fine,svd", "--depths", 2, stdin=f"{chain.learngene}\n{chain.model}\n")
    assert piped.out == named.out


def test_without_input_it_does_not_start_from_its_own_members(chain: Any) -> None:
    command = ("--method", "svd,fine", "--depths", "2,3")
    ran = family(*command)
    assert ran.out == family(chain.learngene, chain.model, *command).out, "the newest model that init did not make"
    assert f"no INPUT given: the newest is taken, {chain.model}, by svd" in ran.err
    assert family(*command).out == ran.out, "and the same command takes the same again"
    assert family("latest", *command).out == ran.out


def test_all_leaves_out_what_has_no_source_and_says_how_to_get_it(workspace: Path) -> None:
    ran = family("--method", "all", "--depths", "1,2", *NANO)
    anew = [name for name, method in METHODS.items() if method.anew]
    assert names(ran) == [f"dit-nano-{name}-l{depth}" for name in anew for depth in (1, 2)]
    left_out = [line for line in ran.err.splitlines() if "left out: " in line]
    assert len(left_out) == len(METHODS) - len(anew)
    assert all("try: " in line for line in left_out)


def test_all_makes_every_method_that_a_dense_model_is_enough_for(chain: Any) -> None:
    ran = family(chain.model, "--method", "all", "--depth", 2)
    dense = [name for name, method in METHODS.items() if "model" in method.sources]
    assert members(ran) == [f"{name}-l2" for name in dense]
    for line in ran.err.splitlines():
        if "left out: " in line:
            assert "try: finectl condense" in line and "| finectl extract -" in line
    assert "left out: fine;" in ran.err


def test_all_with_nothing_to_start_from(workspace: Path) -> None:
    ran = family("--method", "all", "--depths", "2,4", code=EXIT_INPUT)
    assert ran.out == "" and ran.err.count("error: ") == 1 and "try: " in ran.err
    assert not workspace.exists()


def test_a_named_method_without_a_source_is_an_error_before_any_work(chain: Any) -> None:
    before = sorted(chain.root.glob("model/*"))
    ran = family(chain.model, "--method", "he,fine", "--depths", 2, code=EXIT_INPUT)
    assert ran.out == "" and "learngene" in ran.err and "try: " in ran.err
    assert sorted(chain.root.glob("model/*")) == before


def test_what_is_wrong_with_the_last_member_is_said_before_the_first(chain: Any) -> None:
    ran = family(chain.model, "--method", "he,svd", "--depths", 2, "--variant", "xavier", code=EXIT_USAGE)
    assert ran.out == "" and "--method svd has no variant 'xavier'" in ran.err


def test_all_variants(workspace: Path) -> None:
    ran = family("--method", "he,mimetic", "--variant", "all", "--depth", 1, *NANO)
    assert members(ran) == ["he-xavier-l1", "he-kaiming-l1", "mimetic-paper-l1", "mimetic-swapped-l1"]
    assert Path(ran.out.splitlines()[1]) == single("--method", "he", "--variant", "kaiming", "--depth", 1, *NANO)
    assert Path(ran.out.splitlines()[0]) == single("--method", "he", "--depth", 1, *NANO)


@pytest.mark.parametrize(
    ("only", "made"),
    [
        ("he", ["he-l1", "he-l2"]),
        ("l2", ["he-l2", "mimetic-l2"]),
        ("mimetic-l1", ["mimetic-l1"]),
        ("he-xavier-l2", ["he-l2"]),
        ("l1, he-l2", ["he-l1", "he-l2", "mimetic-l1"]),
    ],
)
def test_only(only: str, made: list[str], workspace: Path) -> None:
    options = ("--method", "he,mimetic", "--depths", "1,2", *NANO)
    assert members(family(*options, "--only", only)) == made


def test_an_array_job_makes_what_one_job_makes(workspace: Path) -> None:
    options = ("--method", "he,mimetic", "--variant", "all", "--depths", "1,2", *NANO)
    plans = [json.loads(line) for line in family(*options, "--dry-run", "--json").out.splitlines()[:-1]]
    for part in ("he-kaiming", "he-xavier-l1", "he-xavier-l2,mimetic"):
        family(*options, "--only", part)
    whole = family(*options)
    assert whole.err.count("already there") == len(plans) == 8
    assert whole.out.splitlines() == [plan["path"] for plan in plans]


def test_a_member_records_the_command_that_makes_it_alone(workspace: Path) -> None:
    path = Path(family("--method", "he,mimetic", "--depths", "1,2", *NANO).out.splitlines()[2])
    command = yaml.safe_load((path / "manifest.yaml").read_text())["command"]
    assert command[-2:] == ["--only", "mimetic-l1"]
    assert run_cli(*command[1:]).path == path
    assert run_cli("init", "--recipe", path).path.resolve() == path.resolve()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "he,mimetc"), "did you mean 'mimetic'"),
        (("--method", "he,he"), "--method names something twice"),
        (("--method", "he,"), "unknown initialisation method ''"),
        (("--method", "he", "--depths", "2,2"), "--depths names something twice"),
        (("--method", "he", "--depths", "2,0"), "no list of depths"),
        (("--method", "he", "--depths", "two"), "no list of depths"),
        (("--method", "he", "--depths", ""), "no list of depths"),
        (("--method", "he", "--depths", "2", "--depth", "3"), "both given"),
        (("--method", "he", "--depths", "2,3", "--only", "he-l4"), "did you mean 'he-l"),
        (("--method", "he", "--depths", "2,3", "--only", "l2,mimetic"), "'mimetic'"),
        (("--method", "he", "--depths", "2,3", "--out", "x"), "--out x is one place"),
        (("--method", "he,mimetic", "--depth", "2", "--set", "alpha=1"), "'alpha'"),
    ],
)
def test_usage_errors(options: tuple[object, ...], says: str, workspace: Path) -> None:
    ran = family(*options, *NANO, code=EXIT_USAGE)
    assert says in ran.err and ran.out == "" and ran.err.count("error: ") == 1
    assert not workspace.exists()


def test_out_goes_with_one_member(workspace: Path, tmp_path: Path) -> None:
    options = ("--method", "he", "--depths", "1,2", *NANO, "--out", tmp_path / "made")
    assert family(*options, "--only", "l2").out == f"{tmp_path / 'made'}\n"


def test_a_number_goes_to_the_methods_that_have_it(workspace: Path) -> None:
    name = next(iter(METHODS["mimetic"].constants))
    options = ("--depth", 1, *NANO, "--set", f"{name}=0.25")
    ran = family("--method", "he,mimetic", *options)
    assert Path(ran.out.splitlines()[0]) == single("--method", "he", "--depth", 1, *NANO)
    assert Path(ran.out.splitlines()[1]) == single("--method", "mimetic", *options)


def test_dry_run_says_every_plan_and_the_sums(chain: Any) -> None:
    before = sorted(chain.root.rglob("*"))
    options = (chain.learngene, chain.model, "--method", "fine,svd", "--depths", "2,3", "--dry-run")
    plain, lines = family(*options), family(*options, "--json").out.splitlines()
    assert sorted(chain.root.rglob("*")) == before and plain.out == ""
    *plans, total = map(json.loads, lines)
    assert [(plan["config"]["method"], plan["config"]["depth"]) for plan in plans] == [
        ("fine", 2),
        ("fine", 3),
        ("svd", 2),
        ("svd", 3),
    ]
    assert total["members"] == 4
    for name in ("parameters", "disk_bytes"):
        assert total[name] == sum(plan[name] for plan in plans) > 0
    last = plain.err.splitlines()[-1]
    assert f"4 models, {total['parameters']:,} parameters" in last and "MB" in last
    assert plain.err.count("stage: init") == 4


def test_a_recipe_may_set_lists_and_the_command_line_wins(workspace: Path, tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text("init:\n  method: [he, mimetic]\n  depths: [1, 2]\n  model: dit-nano\n")
    assert members(family("--recipe", path)) == ["he-l1", "he-l2", "mimetic-l1", "mimetic-l2"]
    assert members(family("--recipe", path, "--depths", 3)) == ["he-l3", "mimetic-l3"]
    assert family("--recipe", path, "--depth", 3, "--method", "he").path == single(
        "--method", "he", "--depth", 3, *NANO
    )
    path.write_text("init:\n  method: he\n  depth: 1\n  model: dit-nano\n")
    assert members(family("--recipe", path, "--depths", "2,3")) == ["he-l2", "he-l3"]


def signalled(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """Let SIGINT come while the `at`-th model is being made."""
    import importlib

    module, attribute = name.split(":")
    loaded = importlib.import_module(module)
    real, calls = getattr(loaded, attribute), []

    def patched(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(loaded, attribute, patched)


CASES = {
    "in a method that looks at no signal": ("he,mimetic", "finectl.initializers.he:fresh_state", 2, EXIT_SAVED, 2),
    "in one that saves nothing": ("he,mimetic", "finectl.initializers.mimetic:fresh_state", 1, EXIT_INTERRUPTED, 3),
    "in a tuning": ("he,fine", "finectl.initializers.tuning:fit", 2, EXIT_SAVED, 1),
}


@pytest.mark.parametrize(("methods", "place", "at", "code", "made"), CASES.values(), ids=CASES)
def test_a_signal_in_the_middle_and_the_same_command_goes_on(
    methods: str, place: str, at: int, code: int, made: int, chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = (chain.learngene, "--method", methods, "--depths", "1,2,4")
    whole = [weights(Path(line)) for line in family(*options, "--workspace", tmp_path / "whole").out.splitlines()]
    with monkeypatch.context() as patched:
        signalled(patched, place, at)
        stopped = family(*options, code=code)
    assert len(stopped.out.splitlines()) == made, stopped.err
    assert "interrupted" in stopped.err and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ran = family(*options)
    assert ran.out.startswith(stopped.out) and ran.err.count("already there") == made
    assert [weights(Path(line)) for line in ran.out.splitlines()] == whole


def test_max_time_is_for_the_whole_family(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("finectl.cli.family.time.monotonic", lambda: now[0])
    real: Callable[..., Any] = METHODS.load("he")

    def slow(request: Any) -> Any:
        now[0] += 40
        assert request.job.execution.max_minutes == pytest.approx((60 - now[0] + 40) / 60)
        return real(request)

    options = ("--method", "he", "--depths", "1,2,3", *NANO, "--max-time", "60s")
    with monkeypatch.context() as patched:
        patched.setattr("finectl.initializers.he.initialize", slow)
        stopped = family(*options, code=EXIT_SAVED)
    assert names(stopped) == ["dit-nano-he-l1", "dit-nano-he-l2"]
    assert "--max-time is over; 2 of 3 models are made" in stopped.err and "run the same command again" in stopped.err
    assert names(family(*options)) == ["dit-nano-he-l1", "dit-nano-he-l2", "dit-nano-he-l3"]


def test_each_path_is_there_as_soon_as_its_model_is(workspace: Path) -> None:
    """Standard output is a pipe here, which Python would fill before it writes."""
    arguments = ("init", "--method", "he,direct", "--depths", 1, *NANO, "--tune-steps", 100_000, "--batch-size", 64)
    process = subprocess.Popen(
        command_line(*arguments, "-q"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment()
    )
    assert process.stdout is not None
    try:
        assert b"dit-nano-he-l1" in process.stdout.readline()
        assert process.poll() is None, "the second one is being made"
    finally:
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        assert process.wait(60) in (EXIT_SAVED, EXIT_INTERRUPTED)


TWO_PROCESSES = """
import sys
from finectl.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_make_a_family(chain: Any, free_port: int, tmp_path: Path) -> None:
    options = (chain.learngene, "--method", "he,fine", "--depths", "2,3", *SHORT)
    single_process = run_cli("init", *options, "--workspace", tmp_path / "one").out.splitlines()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, "init", *map(str, options), "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), LOCAL_RANK="0"
            ),
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    made = [Path(line) for line in answers[0][0].splitlines()]
    assert answers[1][0] == "" and [path.name for path in made] == [Path(line).name for line in single_process]
    for path, other in zip(made, single_process, strict=True):
        assert torch.allclose(*(total(place) for place in (path, Path(other))), rtol=1e-4)


def total(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return torch.stack([value.abs().sum() for value in load_file(path / "model.safetensors").values()])


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_planning_a_family_needs_no_torch(chain: Any) -> None:
    code = (
        "import sys; from finectl.cli.main import main; "
        f"code = main(['init', '{chain.learngene}', '{chain.model}', '--method', 'all', '--variant', 'all', "
        "'--depths', '2,4', '--dry-run', '-q']); "
        "print('HEAVY', *(m for m in ('torch', 'numpy') if m in sys.modules)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment()
    )
    assert done.returncode == 0 and done.stdout.strip() == "HEAVY", done.stderr


def test_a_damaged_artifact_is_passed_over_and_named(chain: Any) -> None:
    other = run_cli("train", chain.model, "--steps", 1, "--batch-size", 8).path
    (other / "model.safetensors").write_bytes(b"")
    ran = family("--method", "svd", "--depths", 2)
    assert f"passed over: {other} is damaged" in ran.err and f"the newest is taken, {chain.model}" in ran.err
    damaged = family(other, "--method", "all", "--depths", 2, code=EXIT_INPUT)
    assert "model.safetensors" in damaged.err and damaged.out == ""
