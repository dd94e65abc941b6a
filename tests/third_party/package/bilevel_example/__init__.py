"""Components for bilevel that live in a package of their own."""
