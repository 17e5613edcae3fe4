"""Speed and memory of the library beside other ways to do the same; results and the pages made from them."""
