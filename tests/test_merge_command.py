"""``lightning-bsr merge``: full weights from the configured model or from a file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_bsr import ConfigurationError, ViTClassifier
from lightning_bsr._merge_command import MergeCommand
from lightning_bsr.cli import main
from lightning_bsr.functional import save_delta, select_blocks_

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # tests do, with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",
)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_merge__takes_the_base_from_the_configuration_or_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base, trained = ViTClassifier(), ViTClassifier()
    trained.load_state_dict(base.state_dict())
    save_file(base.model.state_dict(), "base.safetensors")
    select_blocks_(trained, [3])
    torch.nn.init.ones_(trained.model.head.bias)
    save_delta(trained, "delta.safetensors")

    main(["merge", "--delta=delta.safetensors", "--output=full.safetensors"])
    # The head starts at random, and is in the delta.
    assert equal(load_file("full.safetensors"), trained.state_dict())
    assert "Written: full.safetensors, 152 tensors of 2,395,530 values.\n" in capsys.readouterr().out
    # The command line makes such a Trainer; to parse takes longer than to merge.
    trainer = MergeCommand(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.merge(base, "delta.safetensors", "bare.safetensors", base="base.safetensors")
    assert equal(load_file("bare.safetensors"), trained.model.state_dict())
    assert equal(ViTClassifier(checkpoint_path="bare.safetensors").state_dict(), trained.state_dict())

    for output, options, message in (
        ("full.safetensors", {}, "output is 'full.safetensors', which exists already; with --overwrite true it is "),
        ("full.ckpt", {}, "output is 'full.ckpt', expected a file name that ends in .safetensors."),
        ("other.safetensors", {"base": "none.safetensors"}, "base is 'none.safetensors', expected an existing file."),
    ):
        with pytest.raises(ConfigurationError) as error:
            trainer.merge(base, "delta.safetensors", output, **options)
        assert str(error.value).startswith(message)
    assert not Path("other.safetensors").exists()
