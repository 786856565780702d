"""The menu of states and tracks for prompt layers that are not those of an annotator."""

from collections.abc import Sequence
from typing import Any

from magicgui.widgets import ComboBox, Container

from ._state import AnnotatorState
from .layers import choose_next


def create_tracking_menu(
    points_layer: Any, box_layer: Any, states: Sequence[str], track_ids: Sequence[str], tracking_widget: Any = None
) -> Container:
    """Make menus for the state and the track of the next prompt, which follow the layers and which the layers follow.

    Args:
        points_layer: Points with the properties `state` and `track_id`.
        box_layer: Shapes with the property `track_id`.
        states: The states that are offered, such as `track` and `division`.
        track_ids: The tracks that are offered, as texts.
        tracking_widget: A menu that was made before, which gets other tracks; None makes a new one.

    Returns:
        A container with the menus `track_state` and `track_id`.
    """
    if tracking_widget is not None:
        tracking_widget[1].choices = list(track_ids)
        return tracking_widget
    state = ComboBox(name="track_state", choices=list(states))
    track = ComboBox(name="track_id", choices=list(track_ids))

    def show(layer: Any) -> None:
        for menu, column in ((state, "state"), (track, "track_id")):
            known = layer.feature_defaults.get(column)
            if known is not None and known.iloc[0] in menu.choices:
                menu.value = known.iloc[0]

    def choose(layer: Any, column: str, value: str) -> None:
        if layer.feature_defaults[column].iloc[0] != value:
            choose_next(layer, **{column: value})

    def choose_track(value: str) -> None:
        choose(points_layer, "track_id", value)
        choose(box_layer, "track_id", value)
        if AnnotatorState().current_track_id != int(value):
            AnnotatorState().current_track_id = int(value)

    show(points_layer)
    state.changed.connect(lambda value: choose(points_layer, "state", value))
    track.changed.connect(choose_track)
    points_layer.events.feature_defaults.connect(lambda event: show(points_layer))
    box_layer.events.feature_defaults.connect(lambda event: show(box_layer))
    return Container(widgets=[state, track], labels=True)
