"""Programs that cases run as processes of their own, and how a case talks with them."""
