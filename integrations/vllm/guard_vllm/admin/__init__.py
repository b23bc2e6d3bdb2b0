"""What operators see and change over HTTP while a server runs: `/guard/v1`."""
