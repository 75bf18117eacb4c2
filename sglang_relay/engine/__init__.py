"""The only room that imports sglang: hooks, tree, scheduling, staged forward, guards, reports."""
