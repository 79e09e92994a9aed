"""Bad input: each with its exit code, a block that says what is wrong, and the command that mends it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import Ran, run_cli, tiny_safetensors

from finectl.artifacts.kinds import KINDS
from finectl.errors import EXIT_COMPUTATION, EXIT_INPUT, EXIT_OUTPUT, EXIT_USAGE


def refused(ran: Ran, code: int, *words: str) -> None:
    """The error is one block on stderr, nothing is on stdout, and no traceback is shown."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err and "this is a bug" not in ran.err
    blocks = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(blocks) == 1, ran.err
    for word in words:
        assert word in ran.err, ran.err


@pytest.mark.parametrize(
    ("stage", "mends"),
    [
        ("extract", "finectl condense"),
        ("init", "finectl extract"),
        ("train", KINDS["model"].made_by),
        ("sample", KINDS["model"].made_by),
        ("evaluate", KINDS["model"].made_by),
    ],
)
def test_an_empty_workspace_names_the_command_that_fills_it(stage: str, mends: str, workspace: Path) -> None:
    ran = run_cli(stage)
    refused(ran, EXIT_INPUT, str(workspace), f"  try:      {mends}\n")
    assert not workspace.exists()


def test_an_artifact_of_the_wrong_kind(chain: Any) -> None:
    refused(run_cli("train", chain.learngene), EXIT_INPUT, "'learngene'", "'model'")
    refused(run_cli("init", chain.condensed), EXIT_INPUT, "'condensed'", "'learngene'", "finectl extract")
    refused(run_cli("extract", f"model/{chain.model.name}"), EXIT_INPUT, "'model'", "finectl condense")


def test_an_artifact_that_is_not_there_names_the_nearest(chain: Any) -> None:
    refused(run_cli("train", chain.init.name[:-1]), EXIT_INPUT, f"did you mean 'model/{chain.init.name}'", "finectl ls")


@pytest.mark.parametrize("text", ["", ".", "..", "/", "a" * 5000, "model/..", "../..", "latest/latest", "-x"])
def test_an_input_that_is_no_name(text: str, chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain.root)
    ran = run_cli("train", text)
    refused(ran, EXIT_USAGE if text in ("", "-x") else EXIT_INPUT)
    assert len(ran.err) < 2000


def test_unfinished_work_is_no_input(chain: Any) -> None:
    partial = chain.model.with_name(".x.partial")
    chain.model.rename(partial)
    refused(run_cli("sample", partial), EXIT_INPUT, "unfinished work")


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_truncated_weights_are_noticed_when_the_artifact_is_opened(chain: Any) -> None:
    damage(chain.init / "model.safetensors", lambda content: content[:-100])
    refused(
        run_cli("train", chain.init),
        EXIT_INPUT,
        "model.safetensors",
        "as the manifest says",
        "make it again with --force",
    )


def test_a_missing_file_is_noticed_when_the_artifact_is_opened(chain: Any) -> None:
    (chain.init / "model.safetensors").unlink()
    refused(run_cli("train", chain.init), EXIT_INPUT, "model.safetensors is missing", "--force")


@pytest.mark.parametrize("where", [100, -100])
def test_a_flipped_byte_in_a_parent_is_noticed_before_work_starts(where: int, chain: Any) -> None:
    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[where] ^= 1
        return bytes(changed)

    damage(chain.init / "model.safetensors", flip)
    ran = run_cli("train", chain.init)
    refused(ran, EXIT_INPUT, "model.safetensors")
    assert "event=start" not in ran.err
    checked = run_cli("verify", chain.init, chain.model)
    assert checked.code == EXIT_INPUT and checked.out == f"{chain.model}\n"
    assert "1 of 2 artifacts are damaged" in checked.err


def test_one_damaged_artifact_does_not_keep_verify_from_the_others(chain: Any) -> None:
    (chain.init / "manifest.yaml").unlink()
    ran = run_cli("verify", chain.init, chain.model, "no-such-thing")
    assert ran.code == EXIT_INPUT and ran.out == f"{chain.model}\n"
    assert "2 of 3 artifacts are damaged" in ran.err
    everything = run_cli("verify")
    assert everything.code == EXIT_INPUT and len(everything.out.splitlines()) == 3


def rewrite(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "manifest.yaml"
    manifest = yaml.safe_load(path.read_text())
    change(manifest)
    path.write_text(yaml.safe_dump(manifest))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("finectl/2", "pip install --upgrade finectl"),
        ("other/1", "'finectl/1'"),
        (None, "'finectl/1'"),
        (7, "'finectl/1'"),
    ],
)
def test_an_unknown_schema(schema: object, says: str, chain: Any) -> None:
    rewrite(chain.init, lambda manifest: manifest.update(schema=schema))
    refused(run_cli("train", chain.init), EXIT_INPUT, repr(schema), says)


@pytest.mark.parametrize(
    "path",
    [
        "../../secret",
        "/etc/hostname",
        "samples/../../../secret",
        "..",
        "",
        "a\\..\\b",
        "a\0b",
        "x" * 300,
        "\x1b[31m/../x",
    ],
)
def test_a_manifest_whose_paths_lead_out_of_the_artifact(path: str, chain: Any) -> None:
    (chain.root.parent / "secret").write_text("x")
    rewrite(chain.init, lambda manifest: manifest["files"].append({"path": path, "bytes": 1, "sha256": "0" * 64}))
    refused(run_cli("train", chain.init), EXIT_INPUT, "leads out of the artifact")


def test_a_link_that_leads_out_of_the_artifact(chain: Any, tmp_path: Path) -> None:
    weights = chain.init / "model.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.move(weights, outside)
    weights.symlink_to(outside)
    refused(run_cli("train", chain.init), EXIT_INPUT, "is a link that leads out of the artifact")


def test_a_parent_named_by_an_absolute_path_or_outside_of_the_workspace(chain: Any) -> None:
    rewrite(chain.model, lambda manifest: manifest["parents"][0].update(path="/etc"))
    refused(run_cli("show", chain.model), EXIT_INPUT, "absolute path '/etc'")
    rewrite(chain.model, lambda manifest: manifest["parents"][0].update(path="../../../../etc"))
    ran = run_cli("show", chain.model)
    assert ran.code == 0 and "gone or made anew" in ran.out


@pytest.mark.parametrize(
    "text",
    [
        "schema: !!python/object/apply:os.system ['touch OWNED']",
        "schema: !custom finectl/1",
        "schema: finectl/1\n  broken: [",
        "schema: finectl/1\ncreated: 2024-13-45",
        "[" * 100_000,
        "\xff\xfe".encode("latin-1").decode("latin-1"),
        "- a list",
        "",
        "schema: finectl/1",
        "&a [*a]",
    ],
)
def test_a_manifest_that_is_not_plain_yaml_or_not_a_manifest(text: str, chain: Any, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    (chain.init / "manifest.yaml").write_text(text.replace("OWNED", str(owned)), encoding="latin-1")
    refused(run_cli("train", chain.init), EXIT_INPUT, "manifest.yaml")
    assert not owned.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "nonsense"),
        ("files", {"a": 1}),
        ("files", [{"path": "a"}]),
        ("files", [{"path": "a", "bytes": float("inf"), "sha256": ""}]),
        ("files", ["a"]),
        ("parents", [3]),
        ("config", []),
        ("created", 5),
        ("command", [1, {"a": 2}]),
        ("data", {"name": "digits"}),
        ("digest", None),
    ],
)
def test_a_manifest_with_a_key_of_the_wrong_type(key: str, value: object, chain: Any) -> None:
    rewrite(chain.init, lambda manifest: manifest.update({key: value}))
    refused(run_cli("train", chain.init), EXIT_INPUT, "is not a finectl manifest", key)


def test_a_manifest_without_a_key(chain: Any) -> None:
    rewrite(chain.init, lambda manifest: manifest.pop("recipe"))
    refused(run_cli("train", chain.init), EXIT_INPUT, "'recipe' is missing")


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"architecture": "unet"}', '{"width": "x"}', "null", "\udcff"])
def test_a_config_that_is_none(content: str, chain: Any) -> None:
    raw = content.encode(errors="surrogateescape")
    (chain.init / "config.json").write_bytes(raw)

    def resize(manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            if file["path"] == "config.json":
                file["bytes"] = len(raw)

    rewrite(chain.init, resize)
    refused(run_cli("train", chain.init), EXIT_INPUT)


def test_weights_of_another_architecture(chain: Any) -> None:
    """A manifest that is right about the wrong weights."""
    from finectl.artifacts.files import sha256_file
    from finectl.artifacts.manifest import FileRecord, digest_of

    weights = chain.init / "model.safetensors"
    weights.write_bytes(tiny_safetensors())

    def rehash(manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            if file["path"] == weights.name:
                file.update(bytes=weights.stat().st_size, sha256=sha256_file(weights))
        manifest["digest"] = digest_of([FileRecord(**file) for file in manifest["files"]])

    rewrite(chain.init, rehash)
    refused(run_cli("train", chain.init, "--steps", 1), EXIT_INPUT, "do not fit its config.json", "--force")


def test_folders_of_data(workspace: Path, tmp_path: Path) -> None:
    refused(run_cli("condense", "--data", f"folder:{tmp_path / 'none'}"), EXIT_INPUT, "does not exist")
    refused(run_cli("condense", "--data", f"folder:{tmp_path}"), EXIT_INPUT, "holds no images", ".png")
    refused(run_cli("condense", "--data", "folder:"), EXIT_USAGE)
    refused(run_cli("condense", "--data", "digitz"), EXIT_USAGE, "did you mean 'digits'")


def test_data_that_does_not_fit_the_model(chain: Any, tmp_path: Path) -> None:
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    ran = run_cli("train", chain.init, "--data", f"folder:{tmp_path}")
    refused(ran, EXIT_INPUT, "3x8x8", "1x8x8", "finectl init --data folder:")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("condense", "--depth", 0), "x>=1"),
        (("condense", "--steps", 0), "x>=1"),
        (("condense", "--rank", 65), "--overcomplete"),
        (("condense", "--sigma-sharing", 0), "x>=1"),
        (("condense", "--model", "dit-nona"), "did you mean 'dit-nano'"),
        (("condense", "--model", "dit-nano/3"), "/2, /4 or /8"),
        (("condense", "--image-size", 7), "--image-size 8"),
        (("condense", "--factorize", "qkv,q"), "qkv, o, in, out, adaln"),
        (("condense", "--factorize", ""), "factorised types"),
        (("condense", "--lr", "fast"), "fast"),
        (("condense", "--lr", "nan"), "--lr nan"),
        (("condense", "--weight-decay", "inf"), "--weight-decay inf"),
        (("condense", "--steps", "inf"), "inf"),
        (("condense", "--no-such-option"), "--no-such-option"),
        (("condense", "--dtype", "float64"), "bfloat16"),
        (("condense", "--device", "abacus"), "auto, cpu, cuda"),
        (("condense", "--seed", -1), "x>=0"),
        (("condense", "one", "two"), "one"),
        (("condens",), "did you mean 'condense'"),
        (("init", "--method", "fin"), "did you mean 'fine'"),
        (("init", "--method", "auto-lg", "--model", "dit-nano"), "leave --model out"),
        (("init", "--depth", 0), "x>=1"),
        (("ls", "modle"), "did you mean 'model'"),
        (("completion", "tcsh"), "bash"),
    ],
)
def test_wrong_options(arguments: tuple[object, ...], says: str, workspace: Path) -> None:
    ran = run_cli(*arguments)
    refused(ran, EXIT_USAGE, says)
    assert [path.name for path in workspace.glob("*/*")] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sample", "--scheduler", "ddimm"), "did you mean 'ddim'"),
        (("sample", "--sampling-steps", 1001), "1 and 1000"),
        (("sample", "--labels", "3,10"), "between 0 and 9"),
        (("sample", "--labels", ""), "between 0 and 9"),
        (("evaluate", "--metrics", "los"), "did you mean 'loss'"),
        (("evaluate", "--metrics", ""), "metric"),
        (("evaluate", "--samples", 1), "at least 64 images"),
        (("evaluate", "--fail-if", "loss"), "loss>0.1"),
        (("evaluate", "--metrics", "loss", "--fail-if", "accuracy<0.5"), "one of: loss"),
        (("extract", "--depths", "4,0"), "positive integers"),
    ],
)
def test_wrong_options_of_stages_that_read_an_artifact(arguments: tuple[object, ...], says: str, chain: Any) -> None:
    refused(run_cli(*arguments), EXIT_USAGE, says)


def test_a_rank_above_the_width_is_made_when_it_is_said_to_be_meant(workspace: Path) -> None:
    ran = run_cli("condense", "--rank", 65, "--overcomplete", "--depth", 1, "--dry-run")
    assert ran.code == 0


def test_inputs_where_none_or_one_is_taken(chain: Any) -> None:
    refused(run_cli("init", chain.learngene, "--method", "he", "--model", "dit-nano"), EXIT_INPUT, "leave INPUT out")
    refused(run_cli("train", "-", stdin=f"{chain.init}\n{chain.model}\n"), EXIT_INPUT, "2 inputs were given")


@pytest.mark.parametrize("out", [".", "..", "/", "full", "full/file", "full/file/x", "full/.."])
def test_out_refuses_what_is_not_empty_even_with_force(
    out: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "full").mkdir(parents=True)
    (home / "full" / "file").write_text("precious")
    (home / "other").write_text("precious")
    monkeypatch.chdir(home)
    for force in ((), ("--force",)):
        refused(run_cli("condense", "--depth", 1, "--steps", 1, "--batch-size", 2, "--out", out, *force), EXIT_OUTPUT)
        assert (home / "full" / "file").read_text() == "precious"
        assert (home / "other").read_text() == "precious"
    assert sorted(path.name for path in home.rglob("*")) == ["file", "full", "other"]


def test_a_workspace_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/finectl"):
        ran = run_cli("condense", "--depth", 1, "--steps", 1, "--batch-size", 2, "--workspace", place)
        refused(ran, EXIT_OUTPUT, "cannot be made", "--workspace")


@pytest.mark.parametrize("where", ["mkdir", "write_bytes"])
def test_a_workspace_that_may_not_be_written_to(where: str, chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, where, refuse)  # root, who runs this in a container, may write everywhere
    refused(run_cli("train", chain.init, "--steps", 1), EXIT_OUTPUT, "Permission denied", "--workspace")


def test_fail_if_keeps_the_artifact_and_exits_5(chain: Any) -> None:
    arguments = ("evaluate", chain.model, "--metrics", "loss", "--draws", 1)
    ran = run_cli(*arguments, "--fail-if", "loss>0.0001")
    assert ran.code == EXIT_COMPUTATION and Path(ran.out.strip()).is_dir()
    assert "--fail-if loss>0.0001" in ran.err and "Traceback" not in ran.err
    assert run_cli(*arguments, "--fail-if", "loss>0.0001").code == EXIT_COMPUTATION, "cached, it fails as well"
    assert run_cli(*arguments, "--fail-if", "loss>1000").code == 0
