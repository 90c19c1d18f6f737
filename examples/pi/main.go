// Command pi prints the first digits of pi, 2000 of them or as many as its argument says.
package main

import (
	"fmt"
	"math/big"
	"os"
	"strconv"
)

const (
	defaultDigits = 2000
	maxDigits     = 1_000_000
	// guard digits take the rounding errors of the sums.
	guard = 10
)

func main() {
	digits := defaultDigits
	if len(os.Args) > 1 {
		n, err := strconv.Atoi(os.Args[1])
		if err != nil || n < 1 || n > maxDigits {
			fmt.Fprintf(os.Stderr, "pi: %q is no number of digits (1 to %d)\n", os.Args[1], maxDigits)
			os.Exit(2)
		}
		digits = n
	}
	fmt.Println(pi(digits))
}

// pi returns 3 and, after the point, n-1 further digits, by Machin's formula in whole numbers:
// pi/4 = 4 arctan(1/5) - arctan(1/239).
func pi(n int) string {
	one := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(n+guard)), nil)
	sum := new(big.Int).Mul(arctan(5, one), big.NewInt(4))
	sum.Sub(sum, arctan(239, one)).Mul(sum, big.NewInt(4))
	s := sum.String()
	if n == 1 {
		return s[:1]
	}
	return s[:1] + "." + s[1:n]
}

// arctan returns arctan(1/x) in units of 1/one.
func arctan(x int64, one *big.Int) *big.Int {
	power := new(big.Int).Quo(one, big.NewInt(x))
	square := big.NewInt(x * x)
	sum, term := new(big.Int).Set(power), new(big.Int)
	for k, minus := int64(3), true; power.Sign() > 0; k, minus = k+2, !minus {
		power.Quo(power, square)
		term.Quo(power, big.NewInt(k))
		if minus {
			sum.Sub(sum, term)
		} else {
			sum.Add(sum, term)
		}
	}
	return sum
}
