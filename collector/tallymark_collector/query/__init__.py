"""Questions about usage, answered from the views."""
