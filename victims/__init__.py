"""What is attacked, how it is trained and how it is measured: the bottom layer of the grid."""
