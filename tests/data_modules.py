"""DataModules on small files: with defaults for tests, ready to fit, and what they say when something is wrong."""

import pytest

from lightning_bsr import ConfigurationError


def module(cls, root, **options):
    return cls(root, **{"img_size": 8, "batch_size": 4, "num_workers": 0, **options})


def ready(cls, root, **options):
    data = module(cls, root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def message(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)
