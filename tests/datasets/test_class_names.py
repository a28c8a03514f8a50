"""Class names of any bytes, in any composition of letters, under any locale: the right classes, or a named error."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import failure, outcome
from datasets_on_disk import make_pixels, png, write_npz
from killing import environment

from kcdcache.cli import main
from kcdcache.datasets import datasets
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.files import records
from kcdcache.networks.weights import load_network

NFC, NFD = "caf\u00e9", "cafe\u0301"
LOCALES = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "plain C": {"LC_ALL": "C"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1 terminal": {"PYTHONIOENCODING": "latin-1"},
    "ascii terminal": {"PYTHONIOENCODING": "ascii"},
}


def write(root, **splits):
    """Class folders of two images each, by the bytes of their names."""
    for split, names in splits.items():
        for name in names:
            folder = os.path.join(os.fsencode(root), split.encode(), name if isinstance(name, bytes) else name.encode())
            os.makedirs(folder)
            for number, image in enumerate(make_pixels(2, 16, 16)):
                with open(os.path.join(folder, b"%d.png" % number), "wb") as stream:
                    stream.write(png(image))
    return f"folder:{root}"


def process(*words, **variables):
    return subprocess.run([sys.executable, *words], capture_output=True, check=False, env=environment(**variables))


@pytest.mark.parametrize(("train", "val"), [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
def test_letters_composed_in_one_split_and_decomposed_in_the_other_are_one_class(tmp_path, train, val):
    loaded = datasets.load(write(tmp_path, train=["ant", train, "zoo"], val=["zoo", val]))
    assert loaded.classes == ("ant", train, "zoo")
    assert loaded.test.labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_two_names_that_look_alike_are_shown_apart(tmp_path, split):
    names = {"train": ["ant", NFC], "val": ["ant", NFC]}
    names[split].append(NFD)
    with pytest.raises(MismatchError, match=rf"{split} hold two names that look alike, .*'cafe\\u0301'.*'caf\\xe9'"):
        datasets.load(write(tmp_path, **names))


@pytest.mark.parametrize(
    ("name", "shown"), [("\u0441at", r"'\\u0441at'"), ("cat\u00a0", r"'cat\\xa0'"), ("cat ", "'cat '")]
)
def test_an_unknown_name_is_shown_so_that_it_can_be_told_from_a_known_one(tmp_path, name, shown):
    with pytest.raises(MismatchError, match=f"val has class folders that .* lacks: .*{shown}"):
        datasets.load(write(tmp_path, train=["ant", "cat"], val=["ant", name]))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", "łódź".encode("utf-16-le").replace(b"\0", b"_")])
def test_a_folder_that_is_not_utf_8_is_named_and_ends_the_command(tmp_path, capsys, split, name):
    names = {"train": ["ant", "bee"], "val": ["ant", "bee"]}
    names[split].append(name)
    words = ["fit", "--data", write(tmp_path / "d", **names), "--model", "resnet8", "--out", tmp_path / "out"]
    code, told = failure(capsys, *words)
    assert code == 4
    assert f"the class folder {str(name)[1:]} in " in told
    assert "has no name in UTF-8, which classes need; rename it" in told


def test_image_files_that_are_not_utf_8_are_read(tmp_path):
    spec = write(tmp_path, train=["ant", "bee"], val=["ant", "bee"])
    os.rename(tmp_path / "train" / "ant" / "0.png", os.path.join(os.fsencode(tmp_path / "train" / "ant"), b"\xe9.png"))
    loaded = datasets.load(spec)
    assert np.array_equal(loaded.train.images(np.array([1])), make_pixels(2, 16, 16)[:1])
    assert loaded.identity().digest


def test_half_a_character_in_an_archive_is_a_named_error(tmp_path):
    spec = write_npz(tmp_path / "a.npz", classes=np.array(["a", "b", "caf\udce9"]))
    with pytest.raises(MismatchError, match=r"the class name 'caf\\udce9' in 'arrays:.*is not valid UTF-8; rename"):
        datasets.load(spec)


@pytest.mark.parametrize("form", [records.canonical_json, records.readable_json])
def test_a_record_of_a_name_that_is_no_text_is_a_named_error(form):
    with pytest.raises(SettingsError, match=r"the name 'folder:/caf\\udce9' cannot be recorded, .*LC_ALL=C.UTF-8"):
        form({"data": "folder:/caf\udce9", "more": [1]})


CODE = """
import sys
from kcdcache.cli import main
from kcdcache.datasets import datasets
found = datasets.load(sys.argv[1])
print(ascii(found.classes), found.identity().digest, found.test.digest())
"""


def test_classes_and_digests_are_the_same_in_every_locale(tmp_path):
    spec = write(tmp_path, train=["ant", NFC, "łódź", "日本"], val=["日本", NFD, "ant"])
    told = {process("-c", CODE, spec, **variables).stdout for variables in LOCALES.values()}
    assert len(told) == 1
    assert ascii(("ant", NFC, "łódź", "日本")).encode() in told.pop()


@pytest.mark.skipif(shutil.which("localedef") is None, reason="no localedef to make a locale with")
def test_a_real_latin_1_locale_gives_the_same_classes_and_digests(tmp_path):
    made = tmp_path / "locales" / "en_US.ISO-8859-1"
    made.parent.mkdir()
    # -c: warnings are no failure
    done = subprocess.run(
        ["localedef", "-c", "-i", "en_US", "-f", "ISO-8859-1", made], capture_output=True, check=False
    )
    if not made.exists():
        pytest.skip(f"localedef cannot make it: {done.stderr!r}")
    latin = {"LOCPATH": str(made.parent), "LC_ALL": made.name, "PYTHONUTF8": "0"}
    spoken = process("-c", "import sys; print(sys.getfilesystemencoding())", **latin).stdout
    assert spoken.strip() == b"iso8859-1"
    spec = write(tmp_path / "d", train=["ant", NFC, "łódź", "日本"], val=["日本", NFD, "ant"])
    told = process("-c", CODE, spec, **latin)
    assert ascii(("ant", NFC, "łódź", "日本")).encode() in told.stdout, told.stderr
    assert told.stdout == process("-c", CODE, spec, **LOCALES["utf-8"]).stdout


TINY = ["--model", "lessons:TinyNet", "--augment", "none", "--batch-size", "4", "--epochs", "1", "--threads", "1"]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_command_ends_well_whatever_the_terminal_can_show(tmp_path, monkeypatch, encoding):
    """Its data and the folder it writes have names that the terminal cannot show."""
    spec, out = write(tmp_path / "d", train=["ant", "łódź"], val=["ant", "łódź"]), tmp_path / "łódź"
    for words, code in (
        (["fit", "--data", spec, *TINY, "--out", out], 0),
        (["inspect", out], 0),
        (["inspect", spec], 10),
    ):
        shown = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        for name, stream in shown.items():
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            main.main([*map(str, words)])
        for stream in shown.values():
            stream.flush()
        told = {name: stream.buffer.getvalue().decode(encoding, "replace") for name, stream in shown.items()}
        monkeypatch.undo()
        assert ended.value.code == code, told
        assert told["stdout" if code == 0 else "stderr"]
        assert "internal error" not in told["stderr"]


def test_a_teacher_of_classes_that_look_alike_is_refused_with_names_that_can_be_told_apart(tmp_path, capsys):
    specs = [write(tmp_path / form, train=["ant", name], val=["ant", name]) for form, name in (("c", NFC), ("d", NFD))]
    assert outcome(capsys, "fit", "--data", specs[0], *TINY, "--out", tmp_path / "t")[0] == 0
    words = [
        "--data",
        specs[1],
        "--teacher",
        "lessons:TinyNet",
        "--weights",
        tmp_path / "t",
        "--store",
        tmp_path / "s",
        "--augment",
        "none",
    ]
    code, told = failure(capsys, "precompute", *words)
    assert (code, r"differ in classes[1]: 'cafe\u0301' against 'caf\xe9'" in told) == (4, True), told


def test_a_command_in_an_ascii_locale_records_classes_in_utf_8(tmp_path):
    spec, out = write(tmp_path / "d", train=["ant", "łódź"], val=["ant", "łódź"]), tmp_path / "out"
    done = process("-m", "kcdcache", "fit", "--data", spec, *TINY, "--out", str(out), **LOCALES["ascii"])
    assert done.returncode == 0, done.stderr
    assert load_network(out)[0].classes == ("ant", "łódź")


def test_a_folder_whose_path_is_not_utf_8_is_a_named_error(tmp_path):
    place = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    write(os.fsdecode(place), train=["ant", "bee"], val=["ant", "bee"])
    words = [b"-m", b"kcdcache", b"fit", b"--data", b"folder:" + place, b"--model", b"resnet8", b"--out", b"out"]
    done = subprocess.run(
        [os.fsencode(sys.executable), *words], capture_output=True, check=False, env=environment(), cwd=tmp_path
    )
    assert done.returncode == 2
    assert b"cannot be recorded, as it or this locale is not UTF-8" in done.stderr
    assert not (tmp_path / "out" / "run.json").exists()
