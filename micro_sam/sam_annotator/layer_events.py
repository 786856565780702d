"""Events of a viewer's list of layers."""

from collections.abc import Callable
from typing import Any


def follow_layers(viewer: Any, callback: Callable[..., None]) -> None:
    """Call something whenever layers come, go, change places or get another name.

    The names are followed layer by layer: the list of the oldest napari that we support does not tell of them.
    """
    events = viewer.layers.events
    for event in (events.inserted, events.removed, events.reordered):
        event.connect(callback)
    events.inserted.connect(lambda event: event.value.events.name.connect(callback))
    for layer in viewer.layers:
        layer.events.name.connect(callback)
