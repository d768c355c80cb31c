"""Sets of samples by the programs: whose they are, what is refused, what is not made again."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample_ddp
from config.load import dump_config
from core.files import file_hash
from evaluations import (
    capacity,
    compare,
    digits,
    evaluate,
    make_reference,
    routing_gap,
    sweep,
    threshold_search,
)
from evaluations.digit_classifier import DigitClassifier, save_classifier
from evaluations.scoring import METRICS
from models.pretrained import find_checkpoint, load_pretrained
from models.sealed import MANIFEST_FILE, seal
from sampling.marks import marks
from sampling.sets import RECORD_FILE, hashes_of

ROOT = Path(__file__).parents[2]
SMALL = ["--num-fid-samples", 5, "--per-proc-batch-size", 4, "--num-sampling-steps", 2]
SMALL = [*SMALL, "--cfg-scale", 1, "--device", "cpu"]


def run(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
    module.main()


@pytest.fixture
def sample(trained, tmp_path, monkeypatch):
    """sample_ddp.py into a folder of the test."""

    def call(*flags, ckpt=trained, module=sample_ddp, small=SMALL):
        where = ["--sample-dir", tmp_path / "samples"]
        where += [] if ckpt is None else ["--ckpt", ckpt]
        run(monkeypatch, module, *where, *small, *flags)

    return call


@pytest.fixture
def refused(sample, capsys, monkeypatch):
    """The one line of a program that ends with it."""

    def call(*flags, program=None, **options):
        call = functools.partial(sample, **options)
        if program is not None:
            call = functools.partial(run, monkeypatch, program)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            call(*flags)
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line.removeprefix("error: ")

    return call


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def only_set(folder):
    (record,) = folder.glob(f"samples/*/*/{RECORD_FILE}")
    return record.parent, json.loads(record.read_text())


@pytest.fixture(scope="session")
def other(trained, tmp_path_factory):
    """A run of another folder, whose checkpoint of the same step has another seed."""
    run_dir = tmp_path_factory.mktemp("others") / "runs" / "more" / "mine"
    source = find_checkpoint(trained)
    folder = run_dir / "checkpoints" / source.name
    shutil.copytree(source, folder)
    loaded = load_pretrained(folder)
    loaded.config.seed = 1
    (folder / "config.yaml").write_text(dump_config(loaded.config))
    (folder / MANIFEST_FILE).unlink()
    seal(folder)
    return run_dir


@pytest.fixture(scope="session")
def same_name(other, tmp_path_factory):
    """The other run under the name of the first."""
    run_dir = tmp_path_factory.mktemp("same") / "diffmoe"
    shutil.copytree(other, run_dir)
    return run_dir


def test_a_set_lies_in_its_runs_folder_and_its_files_say_whose_they_are(
    sample, other, trained, tmp_path, monkeypatch
):
    sample("--capacity", ckpt=other)
    folder, record = only_set(tmp_path)
    assert folder.parent.name == record["run"] == "more_mine"
    assert folder.name == "step_0000004-ema-euler2-cfg1-b4-seed0-n5"
    names = ["capacity.npz", "grid.png", "samples.npz", RECORD_FILE]
    assert [str(path) for path in files(folder)] == names
    run(monkeypatch, capacity, folder)
    hashes = hashes_of(record)
    manifest = find_checkpoint(other) / MANIFEST_FILE
    assert hashes["checkpoint_sha256"] == file_hash(manifest)
    for path in folder.glob("*.npz"):
        assert hashes.items() <= marks(path).items(), path
    for path in (folder / "grid.png", folder / "experts.png"):
        with Image.open(path) as picture:
            assert hashes.items() <= picture.text.items()
    assert hashes.items() <= json.loads((folder / "capacity.json").read_text()).items()
    sample("--save", "images", "--labels", "balanced", ckpt=other)
    with Image.open(next(tmp_path.glob("samples/*/*/images/000004.png"))) as picture:
        assert picture.text["checkpoint_sha256"] == hashes["checkpoint_sha256"]


def test_a_finished_set_says_so_and_samples_nothing(sample, tmp_path, caplog, monkeypatch):
    sample()
    folder, _ = only_set(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr("sampling.command.generate_set", None)
    monkeypatch.setattr("sampling.command.load_pretrained", None)
    caplog.clear()
    with caplog.at_level("INFO", logger="diffmoe"):
        sample()
    assert caplog.messages == [f"{folder}: finished before; nothing is sampled"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_set_from_before_a_key_of_the_config_is_no_other_one(sample, tmp_path, caplog):
    sample()
    folder, record = only_set(tmp_path)
    del record["config"]["model"]["text_pooling"], record["config"]["data"]["caption_choice"]
    (folder / RECORD_FILE).write_text(json.dumps(record))
    with caplog.at_level("INFO", logger="diffmoe"):
        sample()
    assert caplog.messages[-1] == f"{folder}: finished before; nothing is sampled"


def test_another_run_of_the_same_name_is_refused_until_it_may_replace(
    sample, refused, trained, same_name, tmp_path
):
    sample()
    folder, record = only_set(tmp_path)
    archive = (folder / "samples.npz").read_bytes()
    said = refused(ckpt=same_name)
    assert said.startswith(f"--sample-dir: {folder} holds a set of other settings: checkpoint_sha")
    assert said.endswith("--overwrite replaces it, another --sample-dir keeps both")
    assert (folder / "samples.npz").read_bytes() == archive
    sample("--overwrite", ckpt=same_name)
    replaced = only_set(tmp_path)[1]
    assert replaced["config"]["seed"] == 1
    assert replaced["set_sha256"] != record["set_sha256"]
    assert "capacity is false there, true here" in refused("--capacity", ckpt=same_name)


def test_another_runs_unfinished_blocks_stay(sample, refused, same_name, tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    def stop(*args):
        raise StopError

    monkeypatch.setattr("sampling.command._write", stop)
    with pytest.raises(StopError):
        sample()
    monkeypatch.undo()
    blocks = sorted(tmp_path.glob("samples/*/*/parts/0*.npz"))
    assert len(blocks) == 2
    when = [block.stat().st_mtime_ns for block in blocks]
    said = refused(ckpt=same_name)
    assert "holds unfinished blocks of other settings: checkpoint_sha256 is " in said
    assert [block.stat().st_mtime_ns for block in blocks] == when
    sample("--overwrite")  # its own blocks are gone on with
    folder, record = only_set(tmp_path)
    assert not (folder / "parts").exists()
    assert record["images_per_second"] == 0  # nothing was made anew


def test_two_samplers_at_once(sample, trained, tmp_path):
    """Real processes: the second ends with a line, the first with its set."""
    argv = [
        sys.executable,
        "sample_ddp.py",
        "--ckpt",
        trained,
        "--sample-dir",
        tmp_path / "samples",
    ]
    argv += [*SMALL, "--num-sampling-steps", 3000]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, argv)], **options) as first:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("samples/*/*/parts/settings.json")):
            assert time.monotonic() < end
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # it waits for the second
        second = subprocess.run([*map(str, argv)], **options, check=False)
        first.send_signal(signal.SIGCONT)
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
    assert second.returncode == 2
    (line,) = second.stderr.strip().splitlines()
    assert "-b4-seed0-n5 is in use by process" in line
    assert str(first.pid) in line
    assert not list(tmp_path.rglob(".lock"))


REFERENCE = {"pool": (8, 2048), "spatial": (8, 2023)}


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """A reference of random features, for scores that take no minute of algebra."""
    quick = {name: METRICS["inception"][name] for name in ("is", "pr")}
    monkeypatch.setitem(METRICS, "inception", quick)
    random = np.random.default_rng(0)
    path = tmp_path / "ref.npz"
    np.savez(path, **{k: random.random(v, dtype=np.float32) for k, v in REFERENCE.items()})
    return path


def test_a_finished_set_is_scored_from_what_it_kept(
    sample, refused, scoring, reference, tmp_path, capsys, monkeypatch
):
    """Made without scores, scored later; once more; and against another reference."""
    network = ["--metrics", reference, *scoring[2:]]
    sample()
    folder, record = only_set(tmp_path)
    monkeypatch.setattr("sampling.command.generate_set", None)
    capsys.readouterr()
    sample(*network)
    printed = capsys.readouterr().out
    scored = json.loads((folder / RECORD_FILE).read_text())
    assert set(scored["scores"]) == {"IS", "precision", "recall"}
    assert scored["scored"]["reference_sha256"] == file_hash(reference)
    assert {k: v for k, v in scored.items() if k in record} == record
    assert hashes_of(record).items() <= marks(folder / "features.npz").items()
    with monkeypatch.context() as patch:
        patch.setattr("evaluations.sampled.extractor_from", None)
        sample(*network)  # the same scores need no network
        sample()
    assert capsys.readouterr().out == 2 * printed
    (folder / "samples.npz").unlink()
    np.savez(reference, pool=np.eye(8, 2048, dtype=np.float32))
    sample(*network)
    again = json.loads((folder / RECORD_FILE).read_text())
    assert again["scored"]["reference_sha256"] == file_hash(reference)
    assert again["scores"]["IS"] == scored["scores"]["IS"]
    (folder / "features.npz").unlink()
    np.savez(reference, pool=np.ones((8, 2048), np.float32))
    assert "keeps neither images nor features of inception" in refused(*network)


def test_scores_that_fail_lose_no_images(sample, scoring, reference, tmp_path, monkeypatch):
    class FullError(Exception):
        pass

    def full(*args):
        raise FullError

    network = ["--metrics", reference, *scoring[2:], "--save", "none"]
    with monkeypatch.context() as patch:
        patch.setattr("evaluations.sampled._scores", full)
        with pytest.raises(FullError):
            sample(*network)
    assert (only_set(tmp_path)[0] / "features.npz").exists()
    monkeypatch.setattr("sampling.command.generate_set", None)
    sample(*network)
    assert "precision" in only_set(tmp_path)[1]["scores"]


def test_programs_refuse_files_of_another_set(
    sample, refused, scoring, reference, tmp_path, capsys, monkeypatch
):
    sample()
    folder, record = only_set(tmp_path)
    sample("--global-seed", 1)
    (theirs,) = set(folder.parent.iterdir()) - {folder}
    out, network = tmp_path / "out.json", [*scoring[2:], "--metrics", "is"]
    run(monkeypatch, evaluate, reference, folder, *network, "--out", out)
    found = json.loads(out.read_text())
    assert hashes_of(record).items() <= found.items()
    mine = (folder / "samples.npz").read_bytes()
    shutil.copy(theirs / "samples.npz", folder)
    np.savez(folder / "features.npz", pool=np.zeros((5, 2048)), **marks(theirs / "samples.npz"))
    for name in ("features.npz", "samples.npz"):
        said = refused(reference, folder / name, *network, program=evaluate)
        assert f"{name}: belongs to another set: set_sha256 is" in said
        assert "npz: belongs to another set" in refused(folder, program=compare)
        (folder / name).unlink()
    (folder / "samples.npz").write_bytes(mine)
    (folder / "capacity.json").write_text(json.dumps({"set_sha256": "0"}))
    assert "capacity.json: belongs to another set" in refused(folder, program=compare)
    (folder / "capacity.json").unlink()
    run(monkeypatch, compare, folder)
    said = refused(folder, "--out", tmp_path, program=compare)
    assert said.startswith("--out: does nothing here; it needs --runs, or sets with scores")


def labels_of(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [row[0] for row in rows[2:]]


def test_a_sweep_over_a_b_a_tells_runs_apart(
    sample, refused, trained, other, same_name, tmp_path, capsys
):
    grid = ["--grid", f"ckpt={trained},{other},{trained}"]
    said = refused(*grid, module=sweep)
    assert said == "--ckpt: does nothing here; it is varied"
    sample(*grid, ckpt=None, module=sweep)
    table = capsys.readouterr().out
    assert labels_of(table) == ["diffmoe", "more_mine", "diffmoe"]
    assert len(list(tmp_path.glob("samples/*/*/set.json"))) == 2
    first, _, third = table.splitlines()[2:]
    assert first == third
    # The same step and name of another run: neither its numbers nor its name.
    said = refused("--grid", f"ckpt={other},{same_name}", ckpt=None, module=sweep)
    assert "samples/diffmoe/step_0000004-ema-euler2-cfg1-b4-seed0-n5 holds a set of other" in said


def test_a_sweep_refuses_its_last_set_before_the_first(refused, tmp_path):
    grid = ["--grid", "sampler=euler,dopri5"]
    said = refused(*grid, module=sweep)
    assert said.startswith("--num-sampling-steps: does nothing here")
    assert files(tmp_path) == []


def test_compare_names_runs_of_the_same_name_by_their_folders(
    sample, trained, same_name, tmp_path, monkeypatch, capsys
):
    sample()
    sample("--sample-dir", tmp_path / "more", ckpt=same_name)
    sets = [*tmp_path.glob("samples/*/*/"), *tmp_path.glob("more/*/*/")]
    run(monkeypatch, compare, *sets)
    assert labels_of(capsys.readouterr().out) == [str(trained), str(same_name)]


def test_compare_takes_folders_and_records_and_passes_over_what_is_none(
    sample, refused, tmp_path, monkeypatch, capsys, caplog
):
    sample("--capacity")
    sample("--global-seed", 1)
    (folder,) = tmp_path.glob("samples/*/*seed0*")
    run(monkeypatch, capacity, folder)
    unfinished = tmp_path / "samples" / "diffmoe" / "unfinished"
    (unfinished / "parts").mkdir(parents=True)
    capsys.readouterr()
    tables = []
    for pattern in ("*/*/", "*/*/*.json"):
        caplog.clear()
        with caplog.at_level("INFO", logger="diffmoe"):
            paths = sorted(tmp_path.glob(f"samples/{pattern}"))
            run(monkeypatch, compare, *paths)
        passed = unfinished if pattern == "*/*/" else folder / "capacity.json"
        assert caplog.messages == [f"passed over, no record of a finished set: {passed}"]
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert len(labels_of(tables[0])) == 2
    said = refused(folder / "capacity.json", unfinished, program=compare)
    assert said.startswith("compare: no record of a set of samples among ")
    (folder / "broken.json").write_text("{")
    assert "broken.json: no record" in refused(folder, folder / "broken.json", program=compare)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--capacity", "--sampler", "dopri5"], "--capacity: dopri5 takes other steps in every"),
        (["--per-proc-batch-size", 10**8], "--per-proc-batch-size: 100000000 need at least"),
        (["--num-fid-samples", 10**15], "--num-fid-samples: 1000000000000000 need at least"),
        (["--sample-dir", __file__], f"--sample-dir: {__file__} is a file, not a folder"),
        (["--sample-dir", "/proc/none"], "--sample-dir: cannot write to /proc"),
        (["--features", "digits"], "--features: does nothing here; it needs --metrics REF.npz"),
        (["--pr-mode", "adm"], "--pr-mode: does nothing here; it needs --metrics REF.npz"),
        (["--inception-sha256", "0"], "--inception-sha256: does nothing here; it needs --metr"),
        (["--fixed-threshold", "0.4"], "--fixed-threshold: does nothing here"),
        (["--save", "none"], "--save: none leaves nothing without --metrics REF.npz"),
        (["--metrics", "/none.npz"], "/none.npz: no readable .npz file"),
        (["--metrics", ROOT / "docs"], "docs: is a folder; a reference is an .npz file"),
        (["--ckpt", "/none"], "/none: no checkpoint here"),
        (["--weights", "x"], "weights: unknown 'x'; known: ema, model"),
    ],
)
def test_sampling_refuses_before_it_writes(flags, wanted, refused, tmp_path):
    small = [word for word in SMALL if word not in ("--num-sampling-steps", 2)]
    assert wanted in refused(*flags, small=small)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "flags", "wanted"),
    [
        ({"x": (3,)}, [], "no reference; needs mu and sigma, arr_0 or pool, and has x"),
        ({"mu": (64,), "sigma": (64, 64)}, [], "FID: REF has 64 features, the samples 2048"),
        ({"pool": (8, 64)}, [], "FID: REF has 64 features, the samples 2048"),
        ({"pool": (8, 2048)}, [], "sFID: REF has neither mu_s and sigma_s nor arr_0"),
        (
            {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)},
            [],
            "precision: REF has no arr_0, images to compare with",
        ),
        ({"pool": (3, 2048), "spatial": (3, 2023)}, [], "precision: needs at least 4 images, REF"),
        (REFERENCE, ["--num-fid-samples", 3], "precision: needs at least 4 images, --num-fid-s"),
        (REFERENCE, ["--features", "digits"], "digits needs images of 32 x 32, CKPT makes 16 x 16"),
        (REFERENCE, ["--classifier", "x"], "--classifier: does nothing here; it needs --features"),
    ],
)
def test_references_that_do_not_fit_are_refused_before_sampling(
    arrays, flags, wanted, refused, trained, tmp_path
):
    path = tmp_path / "ref.npz"
    np.savez(path, **{name: np.zeros(shape, np.float32) for name, shape in arrays.items()})
    if "digits" in flags:
        save_classifier(tmp_path / "c", DigitClassifier(tuple("0123456789")))
        flags = [*flags, "--classifier", tmp_path / "c"]
    said = refused("--metrics", path, *flags)
    checkpoint = str(find_checkpoint(trained))
    assert wanted in said.replace(str(path), "REF").replace(checkpoint, "CKPT")
    assert not (tmp_path / "samples").exists()


IMAGES = np.zeros((5, 16, 16, 3), np.uint8)


def test_evaluate_refuses_before_features_are_computed(
    refused, tmp_path, inception_weights, monkeypatch
):
    monkeypatch.setattr("evaluations.evaluate.extractor_from", None)
    ref, smp = tmp_path / "ref.npz", tmp_path / "smp.npz"
    np.savez(ref, arr_0=IMAGES)
    np.savez(smp, arr_0=IMAGES)
    save_classifier(tmp_path / "c", DigitClassifier(tuple("0123456789")))
    digit = ["--features", "digits", "--classifier", tmp_path / "c"]
    for flags, wanted in (
        (["--metrics", "fod"], "--metrics: unknown 'fod'; known: fid, is, pr, sfid"),
        (["--metrics", "accuracy"], "--metrics: unknown 'accuracy'; known: fid, is, pr, sfid"),
        (["--out", tmp_path], f"--out: {tmp_path} is a folder; name a file"),
        (["--out", tmp_path / "none" / "a.json"], "--out: no folder"),
        (["--out", "/proc/a.json"], "--out: cannot write to /proc"),
        (["--pr-mode", "adm", "--metrics", "fid"], "--pr-mode: does nothing here; it needs"),
        (["--classifier", "c"], "--classifier: does nothing here; it needs --features digits"),
        ([*digit, "--inception-weights", "c"], "it needs --features inception"),
        (digit, "ref.npz: --features digits needs images of 32 x 32, got (16, 16)"),
    ):
        assert wanted in refused(ref, smp, *flags, program=evaluate)
    np.savez(ref, pool=np.zeros((5, 64)))
    np.savez(smp, pool=np.zeros((5, 64)), logits=np.zeros((5, 10)))
    assert "samples have no labels" in refused(ref, smp, *digit, program=evaluate)
    np.savez(smp, pool=np.zeros((5, 2048)))
    flags = ["--metrics", "is"]
    np.savez(ref, arr_0=IMAGES)
    assert "IS: the samples have no logits features" in refused(ref, smp, *flags, program=evaluate)
    np.savez(smp, pool=np.zeros((5, 2048)), features="digits", features_sha256="0" * 64)
    assert "features of digits 0000" in refused(ref, smp, program=evaluate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "ref.npz", "smp.npz"]


def test_other_programs_refuse_outputs_that_cannot_be_written(
    refused, trained, image_root, tmp_path
):
    out = tmp_path / "none" / "x"
    made = [image_root, out, "--image-size", 16]
    assert "OUT: no folder" in refused(*made, program=make_reference)
    made = [image_root, tmp_path / "x.npz", "--image-size", 16, "--seed", 0]
    assert "--seed: does nothing here; all 23" in refused(*made, program=make_reference)
    said = refused("--data", tmp_path, "--out", tmp_path, program=digits)
    assert said == f"--out: {tmp_path} is a folder; name a file"
    assert "--out: " in refused(tmp_path, "--out", __file__, program=capacity)
    assert "--out: " in refused(tmp_path, "--out", __file__, program=compare)
    search = ["--ckpt", trained, "--metrics", "x", "--write", trained]
    assert "--write: " in refused(*search, program=threshold_search)
    assert files(tmp_path) == []


def test_a_batch_of_images_that_cannot_fit_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluations.evaluate.extractor_from", None)
    monkeypatch.setattr("core.limits.os.sysconf", lambda name: 2000)  # pages, bytes in each
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    both = [tmp_path / "a.npz", tmp_path / "a.npz"]
    said = refused(*both, program=evaluate)
    # 5 images of 299 x 299 x 3 float32 are 5.36 MB.
    assert said.startswith(
        "--batch-size: 5 need at least 0.00536 GB of memory, the machine has 0.004"
    )
    assert said.endswith("the machine has 0.004 GB; at most 3 can be tried")


def test_searches_refuse_what_they_decide_themselves(refused, trained, tmp_path):
    search = ["--ckpt", trained, "--metrics", "x", "--inference", "topk"]
    said = refused(*search, program=threshold_search)
    assert said == "--inference: does nothing here; it is varied"
    gap = ["--ckpt", trained, "--classes", "1"]
    for flags in (["--save", "images"], ["--metrics", "x"], ["--per-proc-batch-size", 4]):
        said = refused(*gap, *flags, program=routing_gap)
        assert said == f"{flags[0]}: does nothing here; the program decides it"


@pytest.mark.parametrize(
    ("module", "required", "said"),
    [
        (sweep, "--ckpt CKPT --grid FLAG=VALUE,VALUE ... [FLAGS]", "for each combination of flags"),
        (threshold_search, "--ckpt CKPT --metrics REF.npz [FLAGS]", "Interval search of DiffMoE's"),
        (routing_gap, "--ckpt CKPT [FLAGS]", "Static against dynamic routing"),
    ],
)
def test_the_help_of_a_search_is_its_own(module, required, said, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, module, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: python -m {module.__name__} {required} ")
    assert said in text
    assert "--cfg-scale" in text
    assert ("--num-per-class" in text) == (module is not routing_gap)
