"""One file per published system; the family stands on the card. Methods never import each other."""
