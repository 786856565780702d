"""The layers of an annotator: napari's views of a session. They show its arrays and hand edits in them to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from napari.layers import Image, Labels, Points, Shapes
from napari.layers.base import ActionType
from napari.utils.colormaps import label_colormap

from ..annotation.geometry import AnnotationImage
from ..annotation.prompt_data import (
    Prompts,
    points_from_arrays,
    points_to_arrays,
    shapes_from_arrays,
    shapes_to_arrays,
)
from ..annotation.session import AUTO, COMMITTED, CURRENT, LAYERS, AnnotationSession
from ..core.errors import MicroSamError

POINTS, SHAPES, TRACKS = "point_prompts", "prompts", "tracks"
LABEL_COLORS = {"positive": "#00FF00", "negative": "#FF0000"}
STATE_COLORS = {"track": "#00FFFF", "division": "#FF00FF"}
_FINISHED = (ActionType.ADDED, ActionType.REMOVED, ActionType.CHANGED)


class LayerViews:
    """Connects the layers of a viewer with a session, both ways.

    The session owns all data: a layer that is deleted comes back with its content, and a renamed one stays connected.

    Args:
        viewer: The viewer.
        session: The session.
        image_layer: The layer of the image; the others take over its scale, translation and units.
        on_prompts: Called after the user has placed, moved or removed a prompt.
        on_restored: Called with a layer that replaces a deleted one.
    """

    def __init__(
        self,
        viewer: Any,
        session: AnnotationSession,
        image_layer: Image,
        on_prompts: Callable[[], None] = lambda: None,
        on_restored: Callable[[Any], None] = lambda layer: None,
    ):
        self.viewer, self.session, self.image_layer = viewer, session, image_layer
        self._on_prompts, self._on_restored = on_prompts, on_restored
        axes = session.image.axes
        # Axes of length one that the image layer has between those of the image; the layers need them, too.
        self._extra = tuple(a for a in range(min(axes), 0) if a not in axes)
        self._ndim = -min(axes)
        self._layers: dict[str, Any] = {}
        self._busy = 0
        self._closed = False
        for name in (CURRENT, AUTO, COMMITTED, POINTS, SHAPES):
            self._create(name)
        session.events.labels.connect(self._show_labels)
        session.events.prompts.connect(self._show_prompts)
        session.events.state.connect(self._show_track)
        session.events.tracks.connect(self._show_tracks)
        viewer.layers.events.removed.connect(self._restore)
        self._show_prompts()
        self._show_tracks()

    def __getitem__(self, name: str) -> Any:
        """The layer with a role, whatever its name is now."""
        return self._layers[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers.values())

    @property
    def plane(self) -> int | None:
        """The slice or frame that the viewer shows; None for an image."""
        n_planes = self.session.n_planes
        return None if n_planes is None else self.session.image.transform.plane_index(self.viewer.dims.point, n_planes)

    def choose_label(self, positive: bool) -> None:
        """Choose whether the next point is positive; points that were placed before stay as they are."""
        self._set_next("label", "positive" if positive else "negative")

    def choose_state(self, state: str) -> None:
        """Choose whether the next point marks a division."""
        self._set_next("state", state)

    def close(self, remove: bool = False) -> None:
        """Disconnect; the layers stay, unless they are to be removed."""
        self._closed = True
        events = self.session.events
        for signal, slot in (
            (events.labels, self._show_labels), (events.prompts, self._show_prompts),
            (events.state, self._show_track), (events.tracks, self._show_tracks),
        ):
            signal.disconnect(slot, missing_ok=True)
        self.viewer.layers.events.removed.disconnect(self._restore)
        for layer in self._layers.values():
            if remove and layer in self.viewer.layers:
                self.viewer.layers.remove(layer)

    # From the session to the layers

    def _show_labels(self, layer: str, box: Any = None) -> None:
        self._layers[layer].refresh()

    def _show_prompts(self) -> None:
        prompts = self.session.prompts
        if prompts == self._read_prompts():
            return
        with self._quiet():
            coordinates, labels, states, tracks = points_to_arrays(prompts.points, self.session.image.ndim)
            columns = {"label": labels, "state": states, "track_id": tracks}
            points = self._layers[POINTS]
            points.selected_data = set()
            points.data = self._lift(np.reshape(coordinates, (-1, self.session.image.ndim)))
            if len(coordinates):
                # Of an empty table napari forgets what the next point gets.
                upcoming = points.feature_defaults
                points.features = pd.DataFrame({c: columns[c] for c in points.features.columns})
                points.feature_defaults = upcoming
                points.refresh_colors(update_color_mapping=False)
            vertices, kinds, tracks, _ = shapes_to_arrays(prompts.shapes)
            shapes = self._layers[SHAPES]
            shapes.selected_data = set()
            shapes.data = []
            if len(vertices):
                shapes.add([self._lift(v) for v in vertices], shape_type=list(kinds), edge_color="green", edge_width=4,
                           face_color="transparent")
                if "track_id" in shapes.features.columns:
                    shapes.features = pd.DataFrame({"track_id": tracks})
            shapes.selected_data = set()

    def _show_track(self) -> None:
        if self.session.mode == "tracking":
            for name in (POINTS, SHAPES):
                self._set_next("track_id", str(self.session.track_id), name)

    def _show_tracks(self) -> None:
        """Show the committed tracks; napari cannot show a layer of none."""
        if self.session.mode != "tracking":
            return
        from ..annotation.tracks import tracks_layer_data
        data, graph = tracks_layer_data(self.session.labels[COMMITTED], self.session.objects.parents)
        layer = self._layers.get(TRACKS)
        if not len(data):
            if layer is not None and layer in self.viewer.layers:
                with self._quiet():
                    self.viewer.layers.remove(layer)
            self._layers.pop(TRACKS, None)
        elif layer is None:
            active = self.viewer.layers.selection.active
            self._layers[TRACKS] = self.viewer.add_tracks(data, graph=graph, name=TRACKS, **self._placement())
            self.viewer.layers.selection.active = active
        else:
            layer.graph = {}
            layer.data = data
            layer.graph = graph

    # From the layers to the session

    def _take_prompts(self, event: Any = None) -> None:
        if self._busy or getattr(event, "action", ActionType.CHANGED) not in _FINISHED:
            return
        before = self.session.prompts
        self.session.set_prompts(self._read_prompts())
        if self.session.prompts != before:
            self._on_prompts()

    def _take_paint(self, layer: str, event: Any) -> None:
        if self._busy:
            return
        try:
            strokes = [read_stroke(atom) for atom in event.value]
            self.session.paint(layer, [(tuple(i[a] for a in self.session.image.axes), *v) for i, *v in strokes])
        except MicroSamError as error:
            self.session.events.message.emit("warning", f"The stroke was taken back: {error}")
            self._layers[layer].refresh()

    def _read_prompts(self) -> Prompts:
        points, shapes = self._layers[POINTS], self._layers[SHAPES]
        features, tracks = points.features, shapes.features
        tracking = self.session.mode == "tracking"
        vertices = [self._lower(v) for v in shapes.data]
        return Prompts(
            points_from_arrays(
                self._lower(points.data), list(features["label"]), list(features["state"]) if tracking else None,
                list(features["track_id"]) if tracking else None,
            ),
            shapes_from_arrays(vertices, list(shapes.shape_type), list(tracks["track_id"]) if tracking else None),
        )

    # Layers

    def _restore(self, event: Any) -> None:
        """A layer of the session that was deleted comes back: the session still has its content."""
        if self._busy or self._closed:
            return
        for name, layer in list(self._layers.items()):
            if layer is event.value and name != TRACKS:
                self._create(name)
                if name in (POINTS, SHAPES):
                    self._show_prompts()
                self._on_restored(self._layers[name])
                self.session.events.message.emit(
                    "info", f"The layer '{name}' belongs to the annotator and was restored. Hide it if it disturbs you."
                )

    def _create(self, name: str) -> None:
        with self._quiet():
            if name in self.viewer.layers:
                # A layer of the user with this name is never overwritten.
                self.viewer.layers[name].name = f"{name} (yours)"
            if name in LAYERS:
                layer = self._create_labels(name)
            else:
                layer = self._create_points() if name == POINTS else self._create_shapes()
        self._layers[name] = layer

    def _create_labels(self, name: str) -> Labels:
        shown = np.expand_dims(self.session.labels[name], tuple(a + self._ndim for a in self._extra))
        layer = self.viewer.add_labels(shown, name=name, **self._placement())
        if name == COMMITTED:
            layer.colormap = label_colormap(seed=0.25)  # ids have other colours than in the layers above
        layer.events.paint.connect(lambda event: self._take_paint(name, event))
        return layer

    def _create_points(self) -> Points:
        tracking = self.session.mode == "tracking"
        choices = {"label": list(LABEL_COLORS)}
        if tracking:
            choices |= {"state": list(STATE_COLORS), "track_id": ["1"]}
        layer = self.viewer.add_points(
            ndim=self._ndim, name=POINTS, property_choices=choices, size=12, symbol="disc",
            border_color="label", border_color_cycle=list(LABEL_COLORS.values()),
            border_width=0.4 if tracking else 0.5, border_width_is_relative=True,
            **({"face_color": "state", "face_color_cycle": list(STATE_COLORS.values())} if tracking
               else {"face_color": "transparent"}),
            **self._placement(),
        )
        layer.border_color_mode = "cycle"
        if tracking:
            layer.face_color_mode = "cycle"
        layer.feature_defaults = {name: values[0] for name, values in choices.items()}
        layer.mode = "add"
        for event in (layer.events.data, layer.events.features):
            event.connect(self._take_prompts)
        return layer

    def _create_shapes(self) -> Shapes:
        options = {"features": pd.DataFrame({"track_id": pd.Series(dtype=object)})}
        tracking = self.session.mode == "tracking"
        layer = self.viewer.add_shapes(
            ndim=self._ndim, name=SHAPES, edge_color="green", edge_width=4,
            face_color="transparent", **(options if tracking else {}), **self._placement(),
        )
        if tracking:
            layer.feature_defaults = {"track_id": "1"}
        layer.current_edge_color, layer.current_edge_width, layer.current_face_color = "green", 4, "transparent"
        for event in (layer.events.data, layer.events.features):
            event.connect(self._take_prompts)
        return layer

    def _placement(self) -> dict[str, Any]:
        image, n = self.image_layer, self._ndim
        placement = {"scale": image.scale[-n:], "translate": image.translate[-n:]}
        if getattr(image, "units", None) is not None:
            placement["units"] = image.units[-n:]
        return placement

    def _lift(self, positions: np.ndarray) -> np.ndarray:
        """Positions (N, ndim) of the session with the axes of the layers."""
        positions = np.asarray(positions, dtype=float)
        return np.insert(positions, [a + self._ndim - k for k, a in enumerate(self._extra)], 0.0, axis=1)

    def _lower(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)[:, list(self.session.image.axes)]

    def _set_next(self, column: str, value: str, name: str = POINTS) -> None:
        layer = self._layers[name]
        with self._quiet():
            # napari keeps the last point selected and would change it, too.
            layer.selected_data = set()
            layer.feature_defaults = {**layer.feature_defaults.iloc[0].to_dict(), column: value}
            if name == POINTS:
                layer.refresh_colors(update_color_mapping=False)

    @contextmanager
    def _quiet(self):
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1


def image_from_layer(layer: Image, mode: str) -> AnnotationImage:
    """The image of a layer for an annotator of a mode; a pyramid gives its finest level."""
    return AnnotationImage.create(
        layer.data, mode=mode, rgb=bool(layer.rgb) or None, name=layer.name, scale=layer.scale,
        translate=layer.translate, units=getattr(layer, "units", None),
    )


def read_stroke(atom: Any) -> tuple[tuple[np.ndarray, ...], Any, Any]:
    """Indices, old values and new value of what napari calls a history atom, in its newer or its older form."""
    if not hasattr(atom, "slice_key"):
        return atom[0], atom[1], atom[2]
    starts = [s.start if isinstance(s, slice) else s for s in atom.slice_key]
    old = np.asarray(atom.old_values)
    mask = np.ones(old.shape, dtype=bool) if atom.mask is None else np.asarray(atom.mask)
    sliced = [axis for axis, s in enumerate(atom.slice_key) if isinstance(s, slice)]
    inside, indices = np.nonzero(mask), []
    for axis, start in enumerate(starts):
        indices.append(inside[sliced.index(axis)] + start if axis in sliced else np.full(len(inside[0]), start))
    return tuple(indices), old.reshape(-1) if atom.mask is None else old, atom.new_value
