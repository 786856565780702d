"""Annotation without a screen: everything that a widget can do, as methods of a session that journals each action."""
