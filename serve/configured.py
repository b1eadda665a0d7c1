"""The application for Serve config files and RayService (`import_path: serve.configured:application`)."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from serve.app import build_app
from serve.settings import ServeSettings
from ssacl.registry.addresses import resolve_model


def application(settings: dict[str, Any]) -> Application:
    """The endpoint by settings of a config file; object storage's variables are those of the machines.

    `checkpoint_url: REGISTRY@stable` is read now, so that all replicas have one version. Serve builds an application again when its
    arguments change: `revision`, which means nothing else, is raised once the channel has moved.

    Raises
    ------
    SSACLError
        A setting is unknown or out of range, everybody on the network could ask, or the registry has no such channel.
    """
    tree = {name: value for name, value in settings.items() if name != "revision"}
    checked = ServeSettings.parse(tree)
    # The address is Serve's own setting, which is not told here: a cluster's is taken to be open.
    checked.service.check_exposure("the address of a Serve config file")
    return build_app(checked.model_copy(update={"checkpoint_url": resolve_model(checked.checkpoint_url)}))
