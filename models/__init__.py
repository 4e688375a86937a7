"""Networks and mathematics: torch only. Nothing here knows a rank, a process group or a file."""
