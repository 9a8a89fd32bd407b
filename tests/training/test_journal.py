"""Records: once each, whole lines, and what the bar and the lines say."""

import io
import json

import pytest

from foldbit.training import journal
from foldbit.training.journal import Journal


def made(run, **changes):
    arguments = {"epochs": 4, "steps_an_epoch": 10, "images_a_step": 8, "epoch": 0, "step": 0, "speaks": True}
    return Journal(run, **{**arguments, **changes})


def record(epoch, accuracy=0.5, seconds=4.0):
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 1.25,
        "test_accuracy": accuracy,
        "seconds": seconds,
    }


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    for name, key in (("metrics", "epoch"), ("losses", "step"), ("warnings", "step")):
        lines = [json.dumps({key: n, "about": "x", "seconds": 1}) for n in (1, 2, 3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    kept = made(tmp_path, epoch=1, step=2)
    assert [r["epoch"] for r in kept.metrics] == [1]
    assert [r["step"] for r in kept.losses] == [1, 2] == [r["step"] for r in kept.warnings]
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 2


def test_others_change_no_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 3}\n{"epoch": 2, "seconds": 3}\n')
    silent = made(tmp_path, epoch=1, speaks=False)
    silent.begin(10)
    silent.step(1)
    silent.loss(11, 1.0, 1.0, 0.5)
    silent.epoch(record(2))
    silent.layers({"a": {"weight error": 1.0}}, {("a", "b"): "c"}, 20)
    silent.say("nothing")
    silent.to_disk()
    silent.close()
    assert [r["epoch"] for r in silent.metrics] == [1, 2] and len(silent.losses) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_line_that_a_kill_cut_is_dropped_and_another_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epo')
    assert journal.records(path) == [{"epoch": 1}]
    assert made(tmp_path, epoch=4).metrics == [{"epoch": 1}]
    assert path.read_text() == '{"epoch": 1}\n'  # else the next record would end up in the cut line
    path.write_text('{"epo\n{"epoch": 1}\n')
    with pytest.raises(ValueError, match="line 1, is no record"):
        journal.records(path)
    path.write_text("7\n{}\n")
    with pytest.raises(ValueError, match="a record is a JSON object, not 7"):
        journal.records(path)
    assert journal.records(tmp_path / "nothing") == []


def test_an_epoch_in_a_line(tmp_path, capsys):
    kept = made(tmp_path)
    kept.begin(0)
    kept.epoch(record(1))
    kept.epoch(record(2, seconds=396.0))
    kept.epoch(record(3, seconds=2.0))
    kept.epoch(record(4, accuracy=0.98765))
    kept.close()
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first == "  epoch 1/4: loss 1.250, test accuracy 50.00%, 4 s, 20 images/s, 12 s left"
    assert second.endswith("396 s, 0 images/s, 7 min left") and third.endswith("2 min left")
    assert last == "  epoch 4/4: loss 1.250, test accuracy 98.77%, 4 s, 20 images/s"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (99, "99 s"), (101, "2 min"), (5999, "100 min"), (9000, "2.5 h")]
)
def test_durations(seconds, words):
    assert journal._duration(seconds) == words


def test_the_bar_shows_the_whole_run(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    genuine = journal.tqdm
    monkeypatch.setattr(
        journal, "tqdm", lambda **named: genuine(**named, file=screen, mininterval=0, miniters=1)
    )
    monkeypatch.setattr(journal.tqdm, "external_write_mode", genuine.external_write_mode, raising=False)
    kept = made(tmp_path, epoch=1, step=10)
    kept.begin(10)
    for step in range(11, 31):
        kept.step((step - 1) // 10)
        kept.loss(step, 0.5, 0.75, 0.875)
    kept.close()
    shown = screen.getvalue().split("\r")
    assert any(
        "epoch 3/4  75%|" in line for line in shown
    )  # of 320 images, those of the first epoch included
    assert any(" images/s, " in line and " left, loss 0.750, accuracy 87.5%" in line for line in shown)
