"""Random configs that megalm accepts, trained and resumed on random layouts, against one rank."""
