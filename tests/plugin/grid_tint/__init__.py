"""One attack and one defense, as a third party would write them."""
