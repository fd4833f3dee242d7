"""What a run folder says, for people: one self-contained page of HTML, and figures side by side."""
