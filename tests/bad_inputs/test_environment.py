"""Items 131 to 144 of the bad inputs: terminals, networks, locales, limits, clocks, devices, hash seeds.

What depends on how a process is started runs in a child; a child that needs torch costs seconds, so that
each does several things.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.bad_inputs.bad_input_cases import rarely
from tests.tiny import TINY_FP32
from tlcli.cache.store import Store
from tlcli.features.extractor import Extractor
from tlcli.machine import paths

ROOT = Path(__file__).parent.parent.parent
TINY = (*TINY_FP32, "-j", "1")
HEAD = (*TINY, "--l2", "0.01,1", "--folds", "2")


@pytest.fixture
def images(tmp_path, make_images):
    return make_images(tmp_path / "images", {"a": 12, "b": 12})


def child(*words, code=None, environment=None, **options):
    """Run `tlcli` in a process of its own, or a script that may call it; return how it ended."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    given = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, *(["-c", code] if code else ["-m", "tlcli"]), *map(str, words)]
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run(command, env=given, timeout=280, check=False, **options)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- 131 and 132: where the output goes ----------------------------------------------------------------

ESCAPE = "\x1b"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"FORCE_COLOR": "1", "NO_COLOR": None},
        *rarely(
            {"TTY_COMPATIBLE": "1", "NO_COLOR": None},
            {"CI": "true"},
            {"TERM": "dumb"},
            {"TERM": None},
            {"COLUMNS": "1"},
        ),
    ],
    ids=str,
)
def test_131_no_terminal(run_cli, images, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    result = run_cli("finetune", images, *HEAD, "-o", "run", "--json")
    assert result.code == 0, result.stderr
    json.loads(result.stdout)
    assert ESCAPE not in result.stdout
    assert "\r" not in result.stderr
    assert len(result.stderr.splitlines()) < 30  # no line per image or step
    assert not re.search(r"\x1b\[[0-9;]*[A-HJKhl]", result.stderr)  # no cursor is moved, no bar drawn
    text = run_cli("data", "check", images)
    assert text.code == 0
    assert not re.search(r"\x1b\[[0-9;]*[A-HJKhl]", text.stdout + text.stderr)
    assert "\r" not in text.stdout + text.stderr
    if "FORCE_COLOR" not in environment and "TTY_COMPATIBLE" not in environment:
        assert ESCAPE not in text.stdout + text.stderr


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_132_terminals(run_cli, images, term):
    assert run_cli("extract", images, *TINY).code == 0
    main, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stderr:
        environment = {"TERM": term, "NO_COLOR": "1"}
        streams = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": stderr}
        done = child("cache", "verify", "--json", environment=environment, **streams)
        plain = child("cache", "verify", environment=environment, **streams)  # with a bar
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(main, 1 << 16):
            shown += part
    os.close(main)
    assert (done.returncode, plain.returncode) == (0, 0)
    assert json.loads(done.stdout)["ok"]
    assert "24" in plain.stdout
    assert ESCAPE not in done.stdout + plain.stdout
    assert not re.search(rb"\x1b\[[0-9;]*(3|4|9)[0-9]m", shown)  # no colour
    assert (ESCAPE.encode() in shown) == (term == "xterm")  # the bar, which no dumb terminal could draw


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_132_a_stream_that_is_closed(closed):
    words = f"exec {closed}>&-; exec {sys.executable} -m tlcli cache list --json"
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", words], env=given, timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert (done.stdout == "") == (closed == 1)


# ---- 133 and 134: no network ---------------------------------------------------------------------------


WAYS_OUT = ("bundled", "local-dir:", "--weights", "copy them to")


def test_133_offline(run_cli, images):
    offline = run_cli("finetune", images, "--backbone", "resnet18.a1_in1k", "--offline", "--json")
    assert (offline.code, offline.stdout) == (4, "")
    assert "not on this machine and this command is offline" in offline.stderr
    for way_out in WAYS_OUT:
        assert way_out in offline.stderr
    assert not paths.home().exists()


@pytest.mark.slow
def test_133_a_proxy_that_refuses(images):
    nowhere = "http://127.0.0.1:9"  # discard: nobody listens
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")
    environment = {**dict.fromkeys(names, nowhere), "HF_HUB_OFFLINE": None, "NO_PROXY": "", "no_proxy": ""}
    words = ("finetune", images, "--backbone", "resnet18.a1_in1k", "--json")
    refused = child(*words, environment=environment)
    assert (refused.returncode, refused.stdout) == (4, ""), refused.stderr
    assert "cannot be reached" in refused.stderr
    assert "Traceback" not in refused.stderr
    for way_out in WAYS_OUT:
        assert way_out in refused.stderr
    assert not list(Path(os.environ["HF_HOME"]).rglob("*.safetensors"))
    assert not paths.home().exists()


@pytest.mark.parametrize("kind", ["half", "incomplete", *rarely("empty", "dangling")])
def test_134_partial_hub_download(run_cli, images, kind):
    import hashlib

    import timm
    from safetensors.torch import save

    torch.manual_seed(0)
    data = save(timm.create_model("test_resnet").state_dict())
    folder = Path(os.environ["HF_HOME"]) / "hub" / "models--timm--test_resnet.r160_in1k"
    commit = "0123456789abcdef0123456789abcdef01234567"
    blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
    link = folder / "snapshots" / commit / "model.safetensors"
    for path in (blob, link, folder / "refs" / "main"):
        path.parent.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    link.symlink_to(blob)
    if kind == "incomplete":
        blob.with_name(blob.name + ".incomplete").write_bytes(data[:-1])
    elif kind != "dangling":
        blob.write_bytes(data[: len(data) // 2] if kind == "half" else b"")
    words = ("extract", images, "--backbone", "test_resnet.r160_in1k", "--image-size", "32", "--json")
    refused = run_cli(*words)
    assert (refused.code, refused.stdout) == (4, "")
    assert "not on this machine" in refused.stderr
    assert ("does not match its hash" in refused.stderr) == (kind in {"half", "empty"})
    assert not paths.home().exists()
    blob.write_bytes(data)  # as a download that is completed
    assert run_cli(*words).code == 0


# ---- 135 and 136: locale and home ----------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}
NO_UTF_8 = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # names are bytes then


@pytest.mark.parametrize("environment", [ASCII, *rarely(NO_UTF_8)], ids=["ascii streams", "no utf-8 at all"])
def test_135_streams_that_are_not_utf_8(environment):
    words = ("recommend", "--size", "small", "--similarity", "low", "--backbone", "naïve_猫")
    shown = child(*words, environment=environment, encoding="utf-8")
    document = child(*words, "--json", environment=environment, encoding="utf-8")
    failed = child("cache", "show", "猫", environment=environment, encoding="utf-8")
    assert (shown.returncode, document.returncode, failed.returncode) == (0, 0, 2), shown.stderr
    for text in (shown.stdout, shown.stderr, document.stdout, failed.stderr):
        assert text.isascii()
        assert "Unicode" not in text
    if environment is ASCII:
        assert r"na\xefve_\u732b" in shown.stdout
        assert "naïve_猫" in json.loads(document.stdout)["command"]
        assert r"\u732b" in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("environment", [ASCII, NO_UTF_8], ids=["ascii streams", "no utf-8 at all"])
def test_135_a_whole_run_where_streams_are_not_utf_8(images, tmp_path, run_cli, environment):
    (images / "b").rename(images / "b 猫")
    (images / "a" / "000.png").rename(images / "a" / "é.png")
    os.rename(images / "a" / "001.png", os.fsencode(images / "a") + b"/\xff\xfe.png")
    (images / "a" / "002.png").write_bytes(b"no image")
    words = ("--max-bad", "0.5", "-o", tmp_path / "run")
    done = child("finetune", images, *HEAD, *words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "bad_images.csv" in done.stderr
    shown = child("predict", tmp_path / "run", images, "--format", "csv", environment=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.isascii()
    names = json.loads((tmp_path / "run" / "run.json").read_text())["class_names"]
    assert [os.fsencode(name) for name in names] == [b"a", "b 猫".encode()]
    assert run_cli("evaluate", tmp_path / "run", "--max-bad", "0.5", "--json").code == 0


@pytest.mark.parametrize("kind", ["unset", "not writable", *rarely("a file", "a link to itself")])
def test_136_home_unset_or_not_writable(run_cli, images, tmp_path, monkeypatch, kind):
    monkeypatch.delenv("TLCLI_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    if kind == "unset":
        # A container's user without an entry in the list of users; this test's own user has one, and its
        # home must not be written, so that the look-up is patched.
        import pwd

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    elif kind == "a file":
        home.write_text("mine")
    elif kind == "not writable":
        monkeypatch.setenv("HOME", "/proc/1")  # where not even root can make a folder
    else:
        home.symlink_to(home)
    words = ("extract", images, *TINY, "--json")
    refused = run_cli(*words)
    assert (refused.code, refused.stdout) == (5, ""), refused.stderr
    assert "TLCLI_HOME" in refused.stderr
    if kind != "unset":
        assert os.environ["HOME"] in refused.stderr
    assert "Traceback" not in refused.stderr
    never = run_cli(*words, "--cache", "never")  # which needs no folder
    assert never.code == 0, never.stderr
    monkeypatch.setenv("TLCLI_HOME", str(tmp_path / "cache"))  # as it says
    assert run_cli(*words).code == 0


# ---- 137 and 138: limits -------------------------------------------------------------------------------


def test_137_no_worker_processes_and_no_shared_memory(run_cli, images, monkeypatch):
    # Images are decoded by threads: a small /dev/shm, fork and spawn do not matter; no worker is left over.
    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    for place in ("os.fork", "os.posix_spawn", "subprocess.Popen.__init__", "multiprocessing.Process.start"):
        monkeypatch.setattr(place, refuse)
    before = set(os.listdir("/dev/shm"))
    result = run_cli("extract", images, *TINY[:-2], "-j", "4", "--json")
    assert result.code == 0, result.stderr
    assert set(os.listdir("/dev/shm")) <= before


LIMITS = """
import contextlib, io, json, os, resource, sys
from tlcli.cli.app import main

def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, "--json"])
    return code, out.getvalue(), err.getvalue(), len(os.listdir("/proc/self/fd"))

images, *tiny = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
extract = ("extract", images, *tiny)
found = [run(*extract), run(*extract, "--cache", "verify"), run("cache", "verify"), run("cache", "list"),
         run("finetune", images, *tiny, "--l2", "0.01,1", "--folds", "2", "-o", "run"), run(*extract)]
with open("/proc/self/status") as file:
    size = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), -1))
found.append(run(*extract[:-2], "--image-size", "4096"))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
found.append(run(*extract))
print(json.dumps(found))
"""


NUM_SHARDS = 280
ELSEWHERE = {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Pacific/Kiritimati"}
CHILD_STEPS = ("extract", "verify mode", "verify", "list", "finetune", "again", "little memory", "after")


@pytest.fixture(scope="module")
def limits(trained, tmp_path_factory):
    """What a child says of an entry of 280 shards with at most 256 open files, and then of little memory.

    Its hash seed, locale and folder are others than those of this process, for items 143 and 144.
    """
    from tlcli.commands.extract import extract, plan_extract
    from tlcli.config.commands import ExtractConfig
    from tlcli.progress import Silent

    home, cwd = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("elsewhere")
    config = ExtractConfig(
        data=str(trained.images), backbone="test_resnet", random_init=True, image_size=32, dtype="fp32",
        workers=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCLI_HOME", str(home))
        plan = plan_extract(config, Silent())
        extract(config, plan, Silent())
        store = Store(paths.features_dir())
    entry = store.find(plan.store.entry.key, repair=True)
    keys = sorted(entry.rows())
    (shard,) = entry.shards()
    rows, missing = entry.read(keys)
    assert not missing
    shard.path.unlink()
    others = [(f"{number:064x}", 0) for number in range(NUM_SHARDS - len(keys))]
    with entry.writer(json.loads(shard.env), flush_bytes=1) as writer:  # a shard a row
        for place, key in enumerate([*keys, *others]):
            writer.add(key, rows[place % len(keys)] + place // len(keys))
    assert len(list(entry.shards_dir.iterdir())) == NUM_SHARDS
    environment = {"TLCLI_HOME": str(home), **ELSEWHERE}
    done = child(trained.images, *TINY, code=LIMITS, environment=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    found = dict(zip(CHILD_STEPS, json.loads(done.stdout), strict=True))
    return found | {"home": home, "run": cwd / "run"}


def test_138_few_open_files(limits):
    for name in CHILD_STEPS[:6]:
        code, out, err, _ = limits[name]
        assert code == 0, (name, err)
        document = json.loads(out)
        if "features" in document:
            assert document["features"]["rows_reused"] == 48
            assert document["features"]["rows_computed"] == (48 if name == "verify mode" else 0)
    assert json.loads(limits["verify"][1])["entries"][0]["rows"] == NUM_SHARDS
    opened = [limits[name][3] for name in CHILD_STEPS[:6]]
    assert max(opened) <= opened[0] + 2  # a library may keep one; none a shard or a run
    assert opened[-1] <= opened[1] + 1


# ---- 139 and 140: clocks -------------------------------------------------------------------------------

CLOCK = """
import sys, time
clock = float(sys.argv[1])
time.time = lambda: clock
from tlcli.cli.app import main
sys.exit(main(sys.argv[2:]))
"""
YEAR = 365 * 86400


@pytest.mark.parametrize("years", [-60, -0.001])
def test_139_clock_that_went_backwards(run_cli, images, years):
    first = json.loads(run_cli("extract", images, *TINY, "--json").stdout)
    before = content_of(paths.features_dir())
    words = ("cache", "prune", "--older-than", "1s", "--max-size", "1kB", "--json")
    done = child(time.time() + years * YEAR, *words, code=CLOCK)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["retired"] == []
    assert len(document["kept_in_use"]) == 1
    assert content_of(paths.features_dir()).items() >= before.items()
    again = json.loads(run_cli("extract", images, *TINY, "--json").stdout)
    assert again["features"]["rows_reused"] == first["features"]["rows_computed"]


def test_140_after_the_year_2038(run_cli, images):
    first = json.loads(run_cli("extract", images, *TINY, "--json").stdout)
    now = 2.0**31 + 10 * YEAR  # 2048
    (mark,) = paths.features_dir().rglob("last_used")
    before = content_of(paths.features_dir())

    def prune(clock):
        for path in (mark, mark.parent):  # as the kernel of such a time would have it
            os.utime(path, (now, now))
        done = child(clock, "cache", "prune", "--older-than", "30d", "--json", code=CLOCK)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    used = prune(now + 60)
    assert used["retired"] == []
    assert content_of(paths.features_dir()) == before
    listed = json.loads(run_cli("cache", "list", "--json").stdout)  # a clock that is behind it is no obstacle
    assert listed["entries"][0]["rows"] == first["features"]["rows_computed"]
    again = json.loads(run_cli("extract", images, *TINY, "--json").stdout)
    assert again["features"]["rows_reused"] == first["features"]["rows_computed"]
    assert len(prune(now + 40 * 86400)["retired"]) == 1  # and what is old there, is


# ---- 141 and 142: devices and memory -------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "mps"])
def test_141_no_gpu(run_cli, images, trained, monkeypatch, device):
    # A machine with a GPU is made to look like one without; on others the patches change nothing.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for words in (
        ("extract", images, *TINY, "--device", device),
        ("finetune", images, *HEAD, "--device", device),
        ("finetune", images, *TINY, "--freeze", "2", "--device", device),
        ("evaluate", trained.run, "--device", device),
        ("predict", trained.run, images, "--device", device),
    ):
        result = run_cli(*words, "--json")
        assert (result.code, result.stdout) == (5, ""), result.stderr
        assert f"--device {device}: there is no such device, this machine has no GPU" in result.stderr
        assert "--device cpu" in result.stderr
    assert not paths.home().exists()
    assert not Path("runs").exists()
    chosen = run_cli(
        "extract", images, *TINY, "--device", "auto"
    )  # the CPU is taken where no device is named
    assert chosen.code == 0
    assert "cpu" in chosen.stderr
    for wrong in ("gpu", "cuda:x", "cpu:1", "cuda:-1"):
        refused = run_cli("extract", images, *TINY, "--device", wrong, "--json")
        assert (refused.code, refused.stdout) == (2, "")
        assert "auto, cpu, cuda, cuda:0 or mps" in refused.stderr


def test_142_little_memory(limits):
    code, out, err, _ = limits["little memory"]
    assert (code, out) == (5, ""), err
    assert "Out of memory" in err
    assert "--image-size" in err
    assert "Traceback" not in err
    code, out, err, _ = limits["after"]  # and nothing was lost
    assert code == 0, err
    assert json.loads(out)["features"]["rows_reused"] == 48


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.77 GiB"), MemoryError()],
    ids=repr,
)
def test_142_out_of_memory_midway(run_cli, images, monkeypatch, error):
    # No test machine need have a GPU: the computation is made to fail as one of too little memory does.
    def rows(*args, **kwargs):
        raise error

    part = ("--limit-per-class", "3", "--json")
    first = json.loads(run_cli("extract", images, *TINY, *part).stdout)["features"]
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "rows", rows)
        failed = run_cli("extract", images, *TINY, "--json")
    assert (failed.code, failed.stdout) == (5, ""), failed.stderr
    assert "Out of memory" in failed.stderr
    for way_out in ("--image-size", "--batch-size", "--device"):
        assert way_out in failed.stderr
    assert "Traceback" not in failed.stderr
    again = json.loads(run_cli("extract", images, *TINY, "--json").stdout)["features"]
    assert again["rows_reused"] == first["rows_computed"] > 0
    assert again["rows_computed"] == 24 - first["rows_computed"]


def test_142_out_of_memory_in_training(run_cli, images, monkeypatch):
    import torch.nn.functional

    words = ("finetune", images, *TINY, "--freeze", "3", "--epochs", "2", "-b", "4", "--head-init", "random",
             "--augment", "none", "--cache", "always", "-o", "run")  # fmt: skip
    real = torch.nn.functional.cross_entropy
    calls = []

    def cross_entropy(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.77 GiB")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
        failed = run_cli(*words, "--json", "--checkpoint-minutes", "0")
    assert (failed.code, failed.stdout) == (5, ""), failed.stderr
    assert "--batch-size" in failed.stderr
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"
    resumed = run_cli(*words, "--resume", "--json")
    assert resumed.code == 0, resumed.stderr
    assert "resumed at step" in resumed.stderr


# ---- 143 and 144: hash seeds, locales, other folders ---------------------------------------------------


def outcome(document, run):
    """Return what must not depend on the process: key, weights, predictions, metrics."""
    return (
        document["features"]["cache_key"],
        document["metrics"],
        document["class_names"],
        (run / "model.safetensors").read_bytes(),
        (run / "predictions-val.csv").read_bytes(),
        (run / "metrics.jsonl").read_bytes(),
    )


def test_143_and_144_hash_seed_locale_and_folder(limits, trained, run_cli, monkeypatch, tmp_path):
    # `--cache verify` of the child found the key, and compared the rows computed there with those from here.
    code, out, err, _ = limits["verify mode"]
    assert code == 0, err
    monkeypatch.setenv("TLCLI_HOME", str(limits["home"]))
    here = run_cli("finetune", trained.images, *HEAD, "-o", tmp_path / "run", "--json")
    assert here.code == 0, here.stderr
    there = json.loads(limits["finetune"][1])
    assert outcome(there, limits["run"]) == outcome(json.loads(here.stdout), tmp_path / "run")
    assert there["features"]["cache_key"] == json.loads(out)["cache_key"]


@pytest.fixture
def here(run_cli, images, tmp_path):
    """The outcome in this process."""
    for number, name in enumerate(("Z", "ä", "10", "9")):  # what locales sort in several ways
        shutil.copytree(images / "ab"[number % 2], images / name)
        for place, path in enumerate(sorted((images / name).iterdir())):
            path.write_bytes(path.read_bytes() + b"%d %d" % (number, place))  # other content, the same pixels
    result = run_cli("finetune", images, *HEAD, "-o", tmp_path / "here", "--json")
    assert result.code == 0, result.stderr
    return outcome(json.loads(result.stdout), tmp_path / "here")


def elsewhere(images, tmp_path, name, environment, cwd):
    run = tmp_path / name
    given = {"TLCLI_HOME": str(tmp_path / f"cache-{name}"), **environment}
    done = child("finetune", images, *HEAD, "-o", run, "--json", environment=given, cwd=cwd)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["features"]["rows_computed"] == 72
    return outcome(document, run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "2", "4294967295", "random"])
def test_143_hash_seeds(here, images, tmp_path, seed):
    assert elsewhere(images, tmp_path, "other", {"PYTHONHASHSEED": seed}, cwd=tmp_path) == here


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locale", "cwd"), [("C.UTF-8", "/"), ("de_DE.UTF-8", "/tmp"), ("tr_TR.UTF-8", "."), ("C", "/proc")]
)
def test_144_locales_and_folders(here, images, tmp_path, locale, cwd):
    assert elsewhere(images, tmp_path, "other", {"LC_ALL": locale, "LANG": locale}, cwd=cwd) == here
