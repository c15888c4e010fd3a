"""The tutorial, from a folder of pictures to an exported model: its code and its commands run in their order."""

import pytest

from lightning_bsr.cli import main
from pages import TUTORIAL, blocks_of, commands_in


@pytest.mark.documentation
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
    "ignore:The dirpath has changed from",  # what is tested comes from another run's folder
)
@pytest.mark.usefixtures("short_frontier")
def test_tutorial__from_pictures_to_an_exported_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for block in blocks_of(TUTORIAL, "python", "yaml", "bash"):
        if block.not_run:
            continue
        if block.language == "yaml":
            (tmp_path / "config.yaml").write_text(block.code)
        elif block.language == "python":
            exec(
                compile("\n" * (block.line - 1) + block.code, str(TUTORIAL), "exec"), {"__name__": "tutorial"}
            )  # a script of its own
        for _, command, *arguments in commands_in(block.code) if block.language == "bash" else ():
            main([command, *arguments, *(["--trainer.max_epochs=1"] if command == "fit" else [])])
            done.append(command)
    assert done == ["plan", "plan", "plan", "fit", "test", "visualize", "export"]
    assert [*(tmp_path / "figures").glob("survivors-*.png")]
    assert " is a " in capsys.readouterr().out.splitlines()[-1]
