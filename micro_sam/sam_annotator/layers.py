"""The layers of an annotator: napari's views of a session. They show its arrays and hand edits in them to it."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from napari.layers import Image, Labels, Points, Shapes
from napari.layers.base import ActionType
from napari.utils.colormaps import label_colormap
from qtpy.QtCore import QTimer

from ..annotation.geometry import AnnotationImage, plane_of
from ..annotation.prompt_data import (
    Prompts,
    points_from_arrays,
    points_to_arrays,
    shapes_from_arrays,
    shapes_to_arrays,
)
from ..annotation.session import AUTO, COMMITTED, CURRENT, LAYERS, AnnotationSession
from ..core.errors import MicroSamError

IMAGE, POINTS, SHAPES, TRACKS = "image", "point_prompts", "prompts", "tracks"
LABEL_COLORS = {"positive": "#00FF00", "negative": "#FF0000"}
POINT_FRACTION = 1 / 48  # of the longer side of the image
POINT_PIXELS = (10, 24)  # on the screen, however near one looks
_AXES = {"2d": "yx", "3d": "zyx", "tracking": "tyx"}
STATE_COLORS = {"track": "#00FFFF", "division": "#FF00FF"}
_FINISHED = (ActionType.ADDED, ActionType.REMOVED, ActionType.CHANGED)
_PLACEMENT = ("scale", "translate", "rotate", "shear", "affine")
_OPEN: weakref.WeakSet = weakref.WeakSet()  # views that are open, of all viewers
_LEFT: weakref.WeakSet = weakref.WeakSet()  # layers of views that were closed, which new ones take away


class LayerViews:
    """Connects the layers of a viewer with a session, both ways.

    The session owns all data: a layer that is deleted comes back with its content, and a renamed one stays connected.
    There is one set of layers in a viewer: new views close those that are there.

    Args:
        viewer: The viewer.
        session: The session.
        image_layer: The layer of the image; the others lie where it lies, also when it is moved or scaled later.
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
        self._arrays: dict[str, np.ndarray] = {}
        self._next = {name: values[0] for name, values in self._choices.items()}
        self._lost: list[tuple[int, Any]] = []
        self._busy = 0
        self.closed = False
        for views in [views for views in _OPEN if views.viewer is viewer]:
            views.close(remove=True)
        _OPEN.add(self)
        for name in (CURRENT, AUTO, COMMITTED, POINTS, SHAPES):
            self._create(name)
        self._face_image()
        self._name_axes()
        session.events.labels.connect(self._show_labels)
        session.events.prompts.connect(self._show_prompts)
        session.events.state.connect(self._show_track)
        session.events.tracks.connect(self._show_tracks)
        viewer.layers.events.removed.connect(self._note_removed)
        for name in _PLACEMENT:
            getattr(image_layer.events, name).connect(self._follow_image)
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
        if n_planes is None:
            return None
        position = self._layers[POINTS].world_to_data(self.viewer.dims.point)[self.session.image.axes[0]]
        return plane_of(min(max(float(position), 0), n_planes - 1))

    def choose_label(self, positive: bool) -> None:
        """Choose whether the next point is positive; points that were placed before stay as they are."""
        self._choose(label="positive" if positive else "negative")

    def choose_state(self, state: str) -> None:
        """Choose whether the next point marks a division."""
        self._choose(state=state)

    def close(self, remove: bool = False) -> None:
        """Disconnect; the layers stay, unless they are to be removed."""
        if self.closed:
            return
        self.closed = True
        _OPEN.discard(self)
        events = self.session.events
        for signal, slot in (
            (events.labels, self._show_labels), (events.prompts, self._show_prompts),
            (events.state, self._show_track), (events.tracks, self._show_tracks),
        ):
            signal.disconnect(slot, missing_ok=True)
        self.viewer.layers.events.removed.disconnect(self._note_removed)
        for name in _PLACEMENT:
            getattr(self.image_layer.events, name).disconnect(self._follow_image)
        for layer in self._layers.values():
            if remove and layer in self.viewer.layers:
                self.viewer.layers.remove(layer)
            else:
                _LEFT.add(layer)

    # From the session to the layers

    def _show_labels(self, layer: str, box: Any = None) -> None:
        self._layers[layer].refresh()

    def _show_prompts(self) -> None:
        prompts = self.session.prompts
        try:
            if prompts == self._read_prompts():
                return
        except (MicroSamError, KeyError):
            pass  # the user has put something into the layer that is no prompt
        with self._quiet():
            coordinates, labels, states, tracks = points_to_arrays(prompts.points, self.session.image.ndim)
            columns = {"label": labels, "state": states, "track_id": tracks}
            points = self._layers[POINTS]
            points.selected_data = set()
            points.data = self._lift(np.reshape(coordinates, (-1, self.session.image.ndim)))
            if len(coordinates):
                points.features = pd.DataFrame({c: columns[c] for c in self._choices})
                points.refresh_colors(update_color_mapping=False)
            vertices, kinds, tracks, _ = shapes_to_arrays(prompts.shapes)
            shapes = self._layers[SHAPES]
            shapes.selected_data = set()
            shapes.data = []
            if len(vertices):
                shapes.add([self._lift(v) for v in vertices], shape_type=list(kinds), edge_color="green", edge_width=4,
                           face_color="transparent")
                if self.session.mode == "tracking":
                    shapes.features = pd.DataFrame({"track_id": tracks})
            shapes.selected_data = set()
            self._keep_choice()  # new tables have other defaults

    def _show_track(self) -> None:
        if self.session.mode == "tracking":
            self._choose(track_id=str(self.session.track_id))

    def _show_tracks(self) -> None:
        """Show the committed tracks; napari cannot show a layer of none."""
        if self.session.mode != "tracking":
            return
        from ..annotation.tracks import tracks_layer_data
        data, graph = tracks_layer_data(self.session.labels[COMMITTED], self.session.objects.parents)
        layer = self._layers.get(TRACKS)
        data = np.column_stack([data[:, 0], self._lift(data[:, 1:])])
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
        if self._busy or self.closed or getattr(event, "action", ActionType.CHANGED) not in _FINISHED:
            return
        before = self.session.prompts
        try:
            self.session.set_prompts(self._read_prompts())
        except (MicroSamError, KeyError) as error:
            self.session.events.message.emit("warning", f"The prompts are as before: they cannot be used so. {error}")
            self._show_prompts()
            return
        if self.session.prompts != before:
            self._on_prompts()

    def _take_paint(self, layer: str, event: Any) -> None:
        if self._busy or self.closed:
            return
        strokes = [read_stroke(atom) for atom in event.value]
        strokes = [(tuple(i[a] for a in self.session.image.axes), *values) for i, *values in strokes]
        # The history is that of the session: napari's own would bring back what is no longer there.
        self._layers[layer]._undo_history.clear()
        array = self.session.labels[layer]
        for where, _, new in strokes:
            array[where] = new  # napari tells of the edits of scripts before it makes them
        try:
            self.session.paint(layer, strokes)
        except MicroSamError as error:
            self.session.events.message.emit("warning", f"The stroke was taken back: {error}")
            QTimer.singleShot(0, lambda: self._take_back(layer, strokes))

    def _take_back(self, layer: str, strokes: list[tuple]) -> None:
        for where, before, _ in reversed(strokes):
            self.session.labels[layer][where] = before
        self._layers[layer].refresh()

    def _take_data(self, name: str) -> None:
        """Someone has given a layer of labels another array: its content is taken over, the array is not."""
        layer = self._layers[name]
        if self._busy or self.closed or layer.data is self._arrays[name]:
            return
        try:
            labels = np.asarray(layer.data)
            self.session.set_labels(name, labels.reshape(self.session.image.shape) if self._fits(labels) else labels)
        except MicroSamError as error:
            self.session.events.message.emit("warning", f"The layer '{name}' is as before: {error}")
        with self._quiet():
            layer.data = self._arrays[name]

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

    def _note_removed(self, event: Any) -> None:
        """A layer of the session that was deleted comes back, when all that are being deleted are gone."""
        if self._busy or self.closed or not any(layer is event.value for layer in self):
            return
        if event.value is self._layers.get(TRACKS):
            del self._layers[TRACKS]  # it is shown again when tracks change
            return
        self._lost.append((event.index, event.value))
        QTimer.singleShot(0, self._restore)

    def _restore(self) -> None:
        lost, self._lost = self._lost, []
        if not lost or self.closed or not hasattr(self.viewer.window, "_qt_window"):  # the window may be closing
            return
        for index, layer in reversed(lost):
            name = next(name for name, known in self._layers.items() if known is layer)
            self._create(name)
            self.viewer.layers.move(len(self.viewer.layers) - 1, index)
            self._on_restored(self._layers[name])
        self._show_prompts()
        self.viewer.layers.selection.active = self._layers[POINTS]
        names = ", ".join(f"'{layer.name}'" for _, layer in lost)
        self.session.events.message.emit(
            "info", f"The annotator needs its layers, so {names} came back. Hide what disturbs you."
        )

    def _create(self, name: str) -> None:
        with self._quiet():
            if name in self.viewer.layers:
                other = self.viewer.layers[name]
                if other in _LEFT:
                    self.viewer.layers.remove(other)
                else:
                    # A layer of the user with this name is never overwritten.
                    other.name = f"{name} (yours)"
            if name in LAYERS:
                layer = self._create_labels(name)
            else:
                layer = self._create_points() if name == POINTS else self._create_shapes()
        self._layers[name] = layer

    def _face_image(self) -> None:
        """Show the plane of an image whose channels are an axis of the viewer; it would show columns and channels."""
        dims = self.viewer.dims
        shown = [dims.ndim + axis for axis in self.session.image.axes[-2:]]
        if dims.ndisplay == 2 and sorted(dims.displayed) != shown:
            dims.order = (*(axis for axis in dims.order if axis not in shown), *shown)

    def _name_axes(self) -> None:
        """Name the axes of the image in the sliders, unless they have names already; napari says `-3` or `0`."""
        dims, names = self.viewer.dims, list(self.viewer.dims.axis_labels)
        for axis, name in zip(self.session.image.axes, _AXES[self.session.mode]):
            if names[axis].lstrip("-").isdigit():
                names[axis] = name
        dims.axis_labels = names

    def _follow_image(self, event: Any = None) -> None:
        placement = self._placement()
        for layer in self:
            for name in _PLACEMENT:
                if name in placement:
                    setattr(layer, name, placement[name])

    def _fits(self, labels: np.ndarray) -> bool:
        squeezed = [n for n in labels.shape if n != 1]
        return squeezed == [n for n in self.session.image.shape if n != 1]

    def _create_labels(self, name: str) -> Labels:
        self._arrays[name] = np.expand_dims(self.session.labels[name], tuple(a + self._ndim for a in self._extra))
        layer = self.viewer.add_labels(self._arrays[name], name=name, **self._placement())
        if name == COMMITTED:
            layer.colormap = label_colormap(seed=0.25)  # ids have other colours than in the layers above
        layer.events.paint.connect(lambda event: self._take_paint(name, event))
        layer.events.data.connect(lambda event: self._take_data(name))
        return layer

    def _create_points(self) -> Points:
        tracking = self.session.mode == "tracking"
        placement = self._placement()
        # napari takes sizes as voxels of the last axis, which may be that of the channels.
        stretch = abs(placement["scale"][self.session.image.axes[-1]] / placement["scale"][-1])
        size = max(self.session.image.shape[-2:]) * POINT_FRACTION * stretch
        layer = self.viewer.add_points(
            ndim=self._ndim, name=POINTS, property_choices=self._choices, size=size, symbol="disc",
            border_color="label", border_color_cycle=list(LABEL_COLORS.values()),
            border_width=0.4 if tracking else 0.5, border_width_is_relative=True, canvas_size_limits=POINT_PIXELS,
            **({"face_color": "state", "face_color_cycle": list(STATE_COLORS.values())} if tracking
               else {"face_color": "transparent"}),
            **placement,
        )
        layer.border_color_mode = "cycle"
        if tracking:
            layer.face_color_mode = "cycle"
            # Ids of tracks are open-ended; of a category napari would make nan of one that is not in it yet.
            layer.features = layer.features.astype({"track_id": object})
        layer.feature_defaults = self._next
        layer.mode = "add"
        for event in (layer.events.data, layer.events.features):
            event.connect(self._take_prompts)
        layer.events.feature_defaults.connect(self._keep_choice)
        return layer

    def _create_shapes(self) -> Shapes:
        options = {"features": pd.DataFrame({"track_id": pd.Series(dtype=object)})}
        tracking = self.session.mode == "tracking"
        layer = self.viewer.add_shapes(
            ndim=self._ndim, name=SHAPES, edge_color="green", edge_width=4,
            face_color="transparent", **(options if tracking else {}), **self._placement(),
        )
        if tracking:
            layer.feature_defaults = {"track_id": self._next["track_id"]}
        layer.current_edge_color, layer.current_edge_width, layer.current_face_color = "green", 4, "transparent"
        for event in (layer.events.data, layer.events.features):
            event.connect(self._take_prompts)
        layer.events.feature_defaults.connect(self._keep_choice)
        return layer

    @property
    def _choices(self) -> dict[str, list[str]]:
        """What is known of each point, and the values that it may have."""
        tracks = {"state": list(STATE_COLORS), "track_id": ["1"]} if self.session.mode == "tracking" else {}
        return {"label": list(LABEL_COLORS), **tracks}

    def _placement(self) -> dict[str, Any]:
        image, n = self.image_layer, self._ndim
        # An axis of channels has one voxel of ours, which is as long as all channels: it is shown with each of them.
        lengths = np.diff(image.extent.data, axis=0)[0, -n:] + 1
        stretch = [2 * lengths[a] if a in self._extra and lengths[a] > 1 else 1 for a in range(-n, 0)]
        placement = {
            "scale": image.scale[-n:] * stretch, "translate": image.translate[-n:], "rotate": image.rotate[-n:, -n:],
            "affine": image.affine.affine_matrix[-n - 1:, -n - 1:],
        }
        if n == image.ndim:
            placement["shear"] = image.shear
        if getattr(image, "units", None) is not None:
            placement["units"] = image.units[-n:]
        return placement

    def _lift(self, positions: np.ndarray) -> np.ndarray:
        """Positions (N, ndim) of the session with the axes of the layers."""
        positions = np.asarray(positions, dtype=float)
        return np.insert(positions, [a + self._ndim - k for k, a in enumerate(self._extra)], 0.0, axis=1)

    def _lower(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)[:, list(self.session.image.axes)]

    def _choose(self, **values: str) -> None:
        """Choose what the next prompts get."""
        self._next |= values
        with self._quiet():
            for layer in (self._layers[POINTS], self._layers[SHAPES]):
                layer.selected_data = set()  # napari keeps the last one selected and would change it, too
            self._keep_choice()

    def _keep_choice(self, event: Any = None) -> None:
        """The next prompt gets what was chosen; napari would give it what the prompts that are selected have."""
        if event is not None and (self._busy or self.closed):
            return
        points, shapes = self._layers[POINTS], self._layers[SHAPES]
        with self._quiet():
            for layer in (points, shapes):
                wanted = {name: value for name, value in self._next.items() if name in layer.features.columns}
                if wanted and layer.feature_defaults.iloc[0].to_dict() != wanted:
                    layer.feature_defaults = wanted
            points.refresh_colors(update_color_mapping=False)

    @contextmanager
    def _quiet(self):
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1


def choose_next(layer: Any, **values: str) -> None:
    """Choose features of the next point or shape; those that were placed before stay as they are."""
    layer.selected_data = set()  # napari would change what is selected, too
    layer.feature_defaults = {**layer.feature_defaults.iloc[0].to_dict(), **values}


def is_left_behind(layer: Any) -> bool:
    """Whether a layer is what an annotator left in the viewer when it was closed."""
    return layer in _LEFT


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
