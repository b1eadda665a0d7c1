"""The application for Serve config files and RayService (`import_path: serve.configured:application`)."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from serve.app import build_app
from serve.settings import ServeSettings


def application(settings: dict[str, Any]) -> Application:
    """The endpoint by settings of a config file; object storage's variables are those of the machines.

    Raises
    ------
    ConfigError
        A setting is unknown or out of range, or everybody on the network could ask.
    """
    checked = ServeSettings.parse(settings)
    # The address is Serve's own setting, which is not told here: a cluster's is taken to be open.
    checked.service.check_exposure("the address of a Serve config file")
    return build_app(checked)
