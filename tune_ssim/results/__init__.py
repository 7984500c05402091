"""The folder of a study, the winner, its proof and its export."""
