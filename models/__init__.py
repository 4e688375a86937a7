"""Networks and mathematics. Imports torch alone, and knows of no rank, process group or file."""
