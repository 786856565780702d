"""The keys of the annotators, and how they are bound so that napari's own keys do not get in the way.

napari asks the active layer first, then the viewer: a key of a layer type (`T` of shapes, `C` of images, `S` of points,
`Ctrl-Z` of labels) hides one of the viewer. So keys are bound to the viewer and to each layer of the annotator.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from napari.utils.key_bindings import coerce_keybinding

Action = Callable[[], Any]


@dataclass(frozen=True)
class Key:
    """A key of an action: `modes` are the annotators that have it; `series` tells that only series of images do."""

    action: str
    key: str
    text: str
    modes: tuple[str, ...] = ("2d", "3d", "tracking")
    series: bool = False


_STACKS = ("3d", "tracking")
_TEXTS = {
    "2d": {"segment": "Segment the object from the prompts"},
    "3d": {
        "segment": "Segment the object in this slice",
        "segment_all": "Segment the object in all slices",
    },
    "tracking": {
        "segment": "Segment the track in this frame",
        "segment_all": "Follow the track through all frames",
    },
}
KEYS = (
    Key("segment", "S", "Segment"),
    Key("segment_all", "Shift-S", "Segment all", _STACKS),
    Key("commit", "C", "Commit the result"),
    Key("toggle_label", "T", "Next point: inside or outside the object"),
    Key("clear", "Shift-C", "Clear prompts and current object"),
    Key("undo", "Control-Z", "Undo"),
    Key("redo", "Control-Shift-Z", "Redo"),
    Key("next_image", "N", "Next image", series=True),
    Key("previous_image", "Shift-N", "Previous image", series=True),
    Key("cancel", "Escape", "Stop what is running"),
    Key("help", "H", "Show or hide this list"),
)


def _keys(mode: str, series: bool) -> list[Key]:
    return [key for key in KEYS if mode in key.modes and (series or not key.series)]


def key_map(mode: str, *, series: bool = False) -> dict[str, str]:
    """Return the key of each action.

    Args:
        mode: `2d`, `3d` or `tracking`.
        series: Whether there is a series of images.
    """
    return {key.action: key.key for key in _keys(mode, series)}


def describe_keys(mode: str, *, series: bool = False) -> list[tuple[str, str]]:
    """Return the keys, as people write them, with what they do."""
    texts = _TEXTS[mode]
    return [(readable_key(key.key), texts.get(key.action, key.text)) for key in _keys(mode, series)]


def readable_key(key: str) -> str:
    """Return a key as people write it, for example `Ctrl + Shift + Z`."""
    return key.replace("Control", "Ctrl").replace("Escape", "Esc").replace("-", " + ")


def shadowed_keys(layer_type: type, keys: Iterable[str]) -> list[str]:
    """Return those keys that napari's own bindings of a layer type would take while such a layer is active."""
    taken = [cls.class_keymap for cls in layer_type.__mro__ if hasattr(cls, "class_keymap")]
    return [key for key in keys if any(coerce_keybinding(key) in keymap for keymap in taken)]


def _own_function(layer: Any, key: str) -> Callable[[Any], Any] | None:
    """What napari does at a key while a layer of that type is active."""
    binding = coerce_keybinding(key)
    for cls in type(layer).__mro__:
        found = getattr(cls, "class_keymap", {}).get(binding)
        if callable(found):
            return found
    return None


class KeyBindings:
    """Keys that are bound to a viewer and its layers; `unbind` gives back what was there before.

    Args:
        viewer: The viewer.
        actions: What each action does, by its name in `key_map`.
        keys: The keys, as `key_map` returns them; only those with an action are bound.
    """

    def __init__(self, viewer: Any, actions: Mapping[str, Action], keys: Mapping[str, str]):
        unknown = set(actions) - {key.action for key in KEYS}
        assert not unknown, f"no such actions: {unknown}"
        self._actions = {keys[name]: action for name, action in actions.items() if name in keys}
        self._cancel = keys.get("cancel")
        self._bound: list[tuple[Any, dict[str, Any]]] = []
        self._bind(viewer)

    def add_layer(self, layer: Any) -> None:
        """Bind the keys to a layer, for example one that replaces a deleted one."""
        if not any(owner is layer for owner, _ in self._bound):
            self._bind(layer)

    def remove_layer(self, layer: Any) -> None:
        """Give a layer its own keys back."""
        for n, (owner, before) in enumerate(self._bound):
            if owner is layer:
                self._restore(owner, before)
                del self._bound[n]
                return

    def unbind(self) -> None:
        """Give viewer and layers their own keys back."""
        for owner, before in self._bound:
            self._restore(owner, before)
        self._bound.clear()

    def _bind(self, owner: Any) -> None:
        before = {}
        for key, action in self._actions.items():
            run = self._leave(key, action) if key == self._cancel else self._run(action)
            before[key] = owner.bind_key(key, run, overwrite=True)
        self._bound.append((owner, before))

    @staticmethod
    def _run(action: Action) -> Callable[[Any], None]:
        def run(_owner: Any) -> None:  # returns nothing: napari would call it when the key is released
            action()
        return run

    @staticmethod
    def _leave(key: str, action: Action) -> Callable[[Any], None]:
        """Escape first ends what is being drawn."""
        def run(owner: Any) -> None:
            is_drawing = getattr(owner, "_is_creating", False)
            own = _own_function(owner, key)
            if own is not None:
                own(owner)
            if not is_drawing:
                action()
        return run

    @staticmethod
    def _restore(owner: Any, before: Mapping[str, Any]) -> None:
        for key, function in before.items():
            owner.bind_key(key, function, overwrite=True)


def bind(
    viewer: Any, layers: Iterable[Any], actions: Mapping[str, Action], *, mode: str, series: bool = False
) -> KeyBindings:
    """Bind the keys of a mode.

    Args:
        viewer: The viewer.
        layers: The layers in which the keys shall work as well: the image and those of the annotator.
        actions: What each action does, by its name in `key_map`.
        mode: `2d`, `3d` or `tracking`.
        series: Whether there is a series of images.
    """
    bindings = KeyBindings(viewer, actions, key_map(mode, series=series))
    for layer in layers:
        bindings.add_layer(layer)
    return bindings
