"""What long work shows in a log, where there is no terminal."""

from pathlib import Path

from detok_pipe.pipelines.progress import progress, say


def test_a_long_message_stays_on_one_line(capsys) -> None:
    message = f"{Path('/', *['folder'] * 40)}: 9 items of [mar]"
    say(message)
    say(message, quiet=True)
    assert capsys.readouterr().err == f"{message}\n"


def test_work_ends_with_one_line_of_its_state(capsys) -> None:
    with progress("encode", total=1200, initial=200) as task:
        task.advance(600)
        task.advance(400, loss=0.123456, quarantined="3", where="x" * 100)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("encode: 1,200/1,200 images, ")
    assert line.endswith(f"left 0:00:00, loss 0.1235  quarantined 3  where {'x' * 100}")


def test_work_that_was_done_before_is_not_mentioned(capsys) -> None:
    with progress("encode", total=5, initial=5):
        pass
    with progress("encode", total=5, quiet=True) as task:
        task.advance(5)
    assert capsys.readouterr().err == ""
