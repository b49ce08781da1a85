"""The drawn world: seeded scenes whose truth (things, colours, masks, depth, words) is known."""
