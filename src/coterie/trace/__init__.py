"""Recording what every lane did, and showing it."""
