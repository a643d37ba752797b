"""What all families share: how operators are declared, run, differentiated, checked and laid out."""
