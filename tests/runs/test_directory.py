"""Where a run directory may be written, and that no interruption loses a run."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
import yaml

from tlcli.config.commands import FinetuneConfig
from tlcli.errors import DataError, Interrupted, StorageError, UsageError
from tlcli.machine import files
from tlcli.runs import continuing
from tlcli.runs.directory import RunDirectory, check_run_dir, default_run_dir, run_to_continue
from tlcli.runs.run import open_run
from tlcli.warned import collected

BEGUN = {"data": {"digest": "d", "num_images": {"train": 3, "val": 1}}, "device": {"name": "cpu"}}


@pytest.fixture
def run(tmp_path):
    """A run that is done."""
    with RunDirectory(tmp_path / "run", FinetuneConfig(), BEGUN) as writer:
        writer.write_bytes("model.safetensors", b"weights")
        writer.finish({})
    return tmp_path / "run"


def test_default_directories_are_numbered_when_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_run_dir("/data/my photos/", "local-dir:/x/mobilenet", "feature-extraction")
    assert str(first) == "runs/my-photos-mobilenet-feature-extraction"
    first.mkdir(parents=True)
    second = default_run_dir("/data/my photos", "hf-hub:org/mobilenet", "feature-extraction")
    assert second.name == first.name + "-2"
    second.symlink_to("nowhere")
    assert default_run_dir("/data/my photos", "mobilenet", "feature-extraction").name == first.name + "-3"
    assert str(default_run_dir("labels.csv", "a/b", "x")) == "runs/labels-b-x"
    assert str(default_run_dir("..", "...", "x")).startswith("runs/x-x-x")


def refused(path, overwrite=False):
    try:
        check_run_dir(FinetuneConfig(output=str(path), overwrite=overwrite))
    except UsageError as error:
        return error
    return None


def test_an_output_is_refused_unless_it_is_new_or_a_run_to_be_replaced(tmp_path, run):
    check_run_dir(FinetuneConfig())  # it will be given a name that is free
    (tmp_path / "mine").mkdir()
    assert not refused(tmp_path / "new")
    assert not refused(tmp_path / "new/below")
    assert not refused(tmp_path / "mine")  # empty
    (tmp_path / "mine/photo.jpg").write_text("precious")
    assert "--overwrite" in refused(tmp_path / "mine").hint
    assert "no run" in refused(tmp_path / "mine", overwrite=True).message
    assert "a run already" in refused(run).message
    assert not refused(run, overwrite=True)
    assert "no run" in refused(tmp_path / "mine/photo.jpg", overwrite=True).message
    assert "no folder" in refused(tmp_path / "mine/photo.jpg/run").message
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert refused(tmp_path / "link")


def test_a_run_is_replaced_only_by_one_that_is_done(run, caplog):
    (run / "report.html").write_text("the earlier report")
    before = (run / "run.json").read_text()
    with pytest.raises(ZeroDivisionError), RunDirectory(run, FinetuneConfig(), {}):
        _ = 1 / 0
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    kept = run.with_name(".run.replaced-1")
    assert (kept / "run.json").read_text() == before
    assert str(kept) in caplog.text
    with pytest.raises(DataError, match="not done") as caught:
        open_run(str(run))
    assert str(kept) in caught.value.hint
    with RunDirectory(run, FinetuneConfig(), {}):
        pass  # ends, and is still not done
    assert {path.name for path in run.parent.glob(".run.replaced-*")} == {kept.name, ".run.replaced-2"}
    with RunDirectory(run, FinetuneConfig(), {}) as writer:
        writer.finish({})
    assert not (run / "report.html").exists()
    assert {path.name for path in run.parent.iterdir() if path.name.startswith(".")} == set()


def test_an_interrupted_overwrite_is_told_and_gone_on_with(run):
    """Killed between the two steps: the old run is out of the way, the new one has not begun."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    kept = run.rename(run.with_name(".run.replaced-1"))
    assert str(kept) in refused(run).message
    with pytest.raises(DataError, match="does not exist") as caught:
        open_run(str(run))
    assert str(kept) in caught.value.hint
    run.mkdir()  # or it had made the folder, and half of a file in it
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (run / f".tmp-{files.HOST}-{process.pid}-{'0' * 32}").write_text("half")
    assert str(kept) in refused(run).message
    given = config(output=str(run), overwrite=True)
    check_run_dir(given)
    with RunDirectory(run, given, BEGUN) as writer:
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
        writer.finish({})
    assert {path.name for path in run.parent.iterdir() if path.name.startswith(".")} == set()
    assert {path.name for path in run.iterdir()} == {"run.json", "config.yaml"}


def test_a_default_directory_is_not_that_of_an_interrupted_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_run_dir("photos", "resnet18", "full")
    (first.parent / f".{first.name}.replaced-1").mkdir(parents=True)
    assert default_run_dir("photos", "resnet18", "full").name == f"{first.name}-2"


def test_a_run_that_cannot_be_begun_leaves_the_old_one_in_place(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "publish", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        RunDirectory(run, FinetuneConfig(), {}).__enter__()
    assert str(run) in caught.value.message
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert [path.name for path in run.parent.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_cannot_be_put_back_is_told(run, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "publish", full)
    monkeypatch.setattr(files, "remove_tree", full)
    with pytest.raises(StorageError, match="No space left"):
        RunDirectory(run, FinetuneConfig(), {}).__enter__()
    kept = run.with_name(".run.replaced-1")
    assert (kept / "model.safetensors").read_bytes() == b"weights"
    assert f"is kept in {kept}" in caplog.text


def test_a_run_that_is_a_link_is_replaced_and_its_target_kept(run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    with RunDirectory(link, FinetuneConfig(), {}) as writer:
        writer.finish({})
    assert not link.is_symlink()
    assert json.loads((link / "run.json").read_text())["status"] == "done"
    assert (run / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_replaced_run_that_cannot_be_removed_is_told(run, monkeypatch, caplog):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    with RunDirectory(run, FinetuneConfig(), {}) as writer:
        writer.finish({})
        monkeypatch.setattr(files, "remove_tree", refuse)
    assert "could not be removed: Permission denied" in caplog.text
    monkeypatch.undo()
    (left,) = [path for path in run.parent.iterdir() if path.name.startswith(".")]
    assert str(left) in caplog.text
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def test_the_working_directory_can_be_a_run_too(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert not refused(".")
    (tmp_path / ".run.replaced-1").mkdir()
    assert str(tmp_path / ".run.replaced-1") in refused(".").message


def test_a_run_is_running_until_it_is_done(tmp_path):
    with RunDirectory(tmp_path / "run", FinetuneConfig(), {"x": 1}) as writer:
        facts = json.loads((tmp_path / "run/run.json").read_text())
        assert (facts["status"], facts["x"]) == ("running", 1)
        with pytest.raises(DataError, match="running"):
            open_run(str(tmp_path / "run"))
        writer.finish({"y": 2})
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "done"


def test_nan_is_never_written(tmp_path):
    with (
        pytest.raises(ValueError, match="JSON"),
        RunDirectory(tmp_path / "run", FinetuneConfig(), {}) as writer,
    ):
        writer.write_json("x.json", {"x": float("nan")})
    assert not (tmp_path / "run/x.json").exists()


# ---- resuming --------------------------------------------------------------------------------------------


def config(**options):
    return FinetuneConfig(**{"data": "/photos", "backbone": "test_resnet", "freeze": "2", **options})


def begin(path, error=None, facts=BEGUN, write=True, **options):
    """Begin or continue a run that ends with `error`, or is killed."""
    writer = RunDirectory(path, config(**options), facts, resume=True, write=write)
    writer.__enter__()
    if error:
        writer.__exit__(type(error), error, None)
    return writer


def status(path):
    return json.loads((path / "run.json").read_text())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "running"),
        (ValueError("x"), "failed"),
        (Interrupted(15), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_unfinished_run_is_continued_in_place(tmp_path, error, expected):
    path = tmp_path / "my run"
    given = config(output=str(path), resume=True)
    check_run_dir(given)
    assert run_to_continue(given) is None
    begin(path, error)
    first = status(path)
    assert run_to_continue(given) == first
    assert run_to_continue(config(output=str(path))) is None
    assert first["status"] == expected
    assert "resumed" not in first
    (path / "checkpoints/step-0000001").mkdir(parents=True)
    with pytest.raises(DataError, match="not done") as caught:
        open_run(str(path))
    assert caught.value.hint.endswith(f"--config '{path}/config.yaml' -o '{path}' --resume")
    for count in (1, 2):
        check_run_dir(config(output=str(path), resume=True))
        writer = begin(path, workers=count, checkpoint_minutes=9.0, data="/else/where")
        facts = status(path)
        assert (facts["status"], facts["resumed"], facts["created"]) == ("running", count, first["created"])
        assert "error" not in facts
    assert (path / "checkpoints/step-0000001").is_dir()
    assert yaml.safe_load((path / "config.yaml").read_text())["workers"] == 2
    writer.finish({})
    assert status(path)["status"] == "done"
    for again in (check_run_dir, lambda given: begin(path)):
        with pytest.raises(UsageError, match="nothing to resume"):
            again(config(output=str(path), resume=True))


@pytest.mark.parametrize("error", [Interrupted(2), KeyboardInterrupt()])
def test_an_interruption_says_how_to_continue(tmp_path, error):
    begin(tmp_path / "run", error)
    hint = error.hint if isinstance(error, Interrupted) else error.__notes__[0]
    assert hint.endswith(f"tlcli finetune --config {tmp_path}/run/config.yaml -o {tmp_path}/run --resume")
    assert (
        not {"output", "overwrite", "resume"}
        & yaml.safe_load((tmp_path / "run/config.yaml").read_text()).keys()
    )


def test_other_options_are_refused_by_name(tmp_path):
    begin(tmp_path / "run", epochs=10, lr="0.001")
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(UsageError) as caught:
        begin(tmp_path / "run", epochs=20, lr="0.001", weight_decay=0.5)
    assert "--epochs was 10, now 20; --weight-decay was None, now 0.5" in caught.value.message
    assert "--lr" not in caught.value.message
    assert (tmp_path / "run/run.json").read_bytes() == before
    begin(tmp_path / "run", epochs=10, lr="0.001")


@pytest.mark.parametrize("item", dataclasses.fields(FinetuneConfig), ids=lambda item: item.name)
def test_every_option_that_can_change_the_result_is_compared(tmp_path, item):
    """Whatever option is added later counts, unless it is named in MAY_DIFFER."""
    left, right = config(), config()
    object.__setattr__(right, item.name, "another")
    with RunDirectory(tmp_path / "run", left, BEGUN) as writer:
        pass
    if item.name in continuing.MAY_DIFFER:
        continuing.check_same(tmp_path / "run", right, writer.facts, writer.facts)
    else:
        with pytest.raises(UsageError, match=f"--{item.name.replace('_', '-')} was .*now another"):
            continuing.check_same(tmp_path / "run", right, writer.facts, writer.facts)


def test_other_data_is_refused(tmp_path):
    begin(tmp_path / "run")
    more = {"digest": "e", "num_images": {"train": 4, "val": 1}}
    with pytest.raises(UsageError, match="3 train, 1 val images, now 4 train, 1 val"):
        begin(tmp_path / "run", facts=BEGUN | {"data": more})
    with pytest.raises(UsageError, match="images, classes or splits changed"):
        begin(tmp_path / "run", facts=BEGUN | {"data": BEGUN["data"] | {"digest": "e"}})


def test_another_device_is_told(tmp_path, caplog):
    begin(tmp_path / "run")
    begin(tmp_path / "run", facts=BEGUN | {"device": {"name": "cuda:0"}})
    assert "device: name was cpu, now cuda:0" in caplog.text


def test_only_runs_are_resumed(tmp_path):
    def refused_resume(path):
        with pytest.raises((UsageError, DataError)) as caught:
            check_run_dir(config(output=str(path), resume=True))
        return caught.value.message

    (tmp_path / "photos").mkdir()
    check_run_dir(config(output=str(tmp_path / "photos"), resume=True))
    (tmp_path / "photos/config.yaml").write_text("epochs: 3")
    assert "is no run" in refused_resume(tmp_path / "photos")
    begin(tmp_path / "run")
    for text, expected in (("{", "cannot be read"), ("{}", "schema None"), ("[]", "schema None")):
        (tmp_path / "run/run.json").write_text(text)
        assert expected in refused_resume(tmp_path / "run")
    (tmp_path / "run/config.yaml").unlink()
    (tmp_path / "run/run.json").unlink()
    check_run_dir(config(output=str(tmp_path / "run"), resume=True))


def test_killed_before_any_operation_while_it_begins(tmp_path, monkeypatch):
    """Whatever is left of a run that was killed as it began, --resume begins or continues it."""

    class Killed(BaseException):
        pass

    for nth in range(1, 100):
        path = tmp_path / str(nth)
        with monkeypatch.context() as patch:
            left = iter(range(1, 1000))

            def wrap(real, left=left, nth=nth):
                def call(*arguments, **options):
                    if next(left) >= nth:  # nothing is cleaned up after a kill
                        raise Killed
                    return real(*arguments, **options)

                return call

            for name in ("open", "write", "fsync", "replace", "mkdir", "unlink"):
                patch.setattr(os, name, wrap(getattr(os, name)))
            try:
                begin(path)
                survived = True
            except Killed:
                survived = False
        check_run_dir(config(output=str(path), resume=True))
        begin(path)
        assert status(path)["status"] == "running"
        if survived:
            break
    assert nth > 10


def finished_run(path):
    """Write a finished run of two epochs."""
    trained = {"recipe": {"epochs": 2}, "training": {"epochs": 2, "steps": 6}}
    writer = begin(path, facts={**BEGUN, **trained}, epochs=2)
    writer.write_text("model.safetensors", "weights")
    writer.write_text("metrics.jsonl", "{}")
    writer.finish({})
    (path / "checkpoints").mkdir()


def test_killed_before_any_operation_while_a_finished_run_goes_on(tmp_path, monkeypatch):
    """At every moment the run is there: done, or in RUN/earlier; and the same command goes on."""

    class Killed(BaseException):
        pass

    facts = {**BEGUN, "continued": {"after_epoch": 2, "to_epoch": 4}, "options": {"epochs": 4}}
    for nth in range(1, 100):
        path = tmp_path / str(nth)
        finished_run(path)
        with monkeypatch.context() as patch:
            left = iter(range(1, 1000))

            def wrap(real, left=left, nth=nth):
                def call(*arguments, **options):
                    if next(left) >= nth:  # nothing is cleaned up after a kill
                        raise Killed
                    return real(*arguments, **options)

                return call

            for name in ("open", "write", "fsync", "replace", "mkdir", "unlink", "link", "rmdir"):
                patch.setattr(os, name, wrap(getattr(os, name)))
            try:
                begin(path, facts=facts, epochs=4)
                survived = True
            except Killed:
                survived = False
        kept = path if status(path)["status"] == "done" else path / "earlier"
        assert status(kept)["training"]["epochs"] == 2
        assert (kept / "model.safetensors").read_text() == "weights"
        check_run_dir(config(output=str(path), resume=True, epochs=4))
        writer = begin(path, facts=facts, epochs=4)
        assert status(path)["status"] == "running"
        assert (path / "earlier/model.safetensors").read_text() == "weights"
        assert not (path / "model.safetensors").exists()
        assert not (path / "checkpoints").exists()
        with writer:
            writer.finish({})
        assert not (path / "earlier").exists()
        if survived:
            break
    assert nth > 20


def test_a_run_that_fails_to_go_on_is_kept_and_that_is_said(tmp_path):
    finished_run(tmp_path / "run")
    facts = {**BEGUN, "continued": {"after_epoch": 2, "to_epoch": 4}}
    with collected() as warnings:
        writer = begin(tmp_path / "run", facts=facts, epochs=4)
        with pytest.raises(RuntimeError, match="no power"), writer:
            raise RuntimeError("no power")
    [warning] = [found for found in warnings if found["code"] == "replaced_run_kept"]
    assert str(tmp_path / "run/earlier") in warning["message"]
    assert status(tmp_path / "run/earlier")["status"] == "done"
    assert status(tmp_path / "run")["status"] == "failed"


def test_where_files_have_one_name_alone_a_run_that_goes_on_is_copied(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EPERM, "Operation not permitted")

    finished_run(tmp_path / "run")
    monkeypatch.setattr(os, "link", refuse)
    begin(tmp_path / "run", facts={**BEGUN, "continued": {"after_epoch": 2}}, epochs=4)
    assert (tmp_path / "run/earlier/model.safetensors").read_text() == "weights"


def test_what_killed_writers_left_is_cleaned(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    begin(tmp_path / "run")
    name = f".tmp-{files.HOST}-{process.pid}-{'0' * 32}"
    left = [tmp_path / "run" / name, tmp_path / name]  # the second is a replaced run, half removed
    left[0].write_text("")
    left[1].mkdir()
    begin(tmp_path / "run")
    assert not any(path.exists() for path in left)


def test_only_one_of_several_processes_writes(tmp_path):
    with RunDirectory(tmp_path / "run", config(), {}, write=False) as writer:
        writer.write_json("x.json", {})
        writer.write_lines("x.jsonl", [{}])
        writer.write_yaml("x.yaml", {})
        writer.finish({"x": 1})
        assert writer.facts["x"] == 1
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    begin(tmp_path / "run", Interrupted(15), write=False)
    with pytest.raises(UsageError, match="other options"):  # so that all processes end, not the writer alone
        begin(tmp_path / "run", epochs=99, write=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_full_disk_does_not_hide_what_happened(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run():
        with RunDirectory(tmp_path / "run", config(), {}):
            monkeypatch.setattr(files, "publish", full)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        run()
