"""One file per subcommand of ``sglang-relay``: ``add`` describes it, and it imports what it needs when it runs."""
