"""Fixtures for the DataModules: a folder of pictures to train with, and no network."""

import urllib.error
import urllib.request

import pytest

from image_folders import save_pictures


@pytest.fixture
def root(tmp_path):
    """Ten pictures of cats, six of dogs, to train with."""
    save_pictures(tmp_path / "train" / "cat", 10)
    save_pictures(tmp_path / "train" / "dog", 6, suffix=".jpg")
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """No test reaches a network, also where there is one."""

    def urlopen(request, *args, **kwargs):
        if request.host.startswith("127.0.0.1"):
            return real(request, *args, **kwargs)
        raise urllib.error.URLError("no network here")

    real = urllib.request.urlopen
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
