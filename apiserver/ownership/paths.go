package ownership

import (
	"strings"
)

// paths is a set of field paths as a tree, in the order in which it is written. Path elements are kept as they are written
// in the JSON of a set, without the quotes around: f:name, v:\"value\", k:{\"name\":\"c\"}. Elements hold plain characters only,
// so that the written form is as good as the value.
type paths struct{ nodes []node }

// node is one path; nodes[0] is the root and index 0 means none.
type node struct {
	elem                    string
	child, last, next, prev int32
	member                  bool
}

const root = 0

func (p *paths) reset() *paths {
	p.nodes = append(p.nodes[:0], node{})
	return p
}

// add appends a child, which must be greater than the children that are there.
func (p *paths) add(parent int32, elem string) int32 {
	i := int32(len(p.nodes))
	last := p.nodes[parent].last
	p.nodes = append(p.nodes, node{elem: elem, prev: last})
	if last == 0 {
		p.nodes[parent].child = i
	} else {
		p.nodes[last].next = i
	}
	p.nodes[parent].last = i
	return i
}

// drop takes back the child that was added last, if it turned out to hold nothing.
func (p *paths) dropEmpty(parent, i int32) {
	n := &p.nodes[i]
	if n.member || n.child != 0 {
		return
	}
	if n.prev == 0 {
		p.nodes[parent].child = 0
	} else {
		p.nodes[n.prev].next = 0
	}
	p.nodes[parent].last = n.prev
	p.nodes = p.nodes[:i]
}

func (p *paths) empty() bool { return p.nodes[root].child == 0 }

// append writes the set as JSON.
func (p *paths) append(out []byte, i int32) []byte {
	out = append(out, '{')
	first := true
	if n := &p.nodes[i]; n.member && n.child != 0 {
		out = append(out, `".":{}`...)
		first = false
	}
	for c := p.nodes[i].child; c != 0; c = p.nodes[c].next {
		if !first {
			out = append(out, ',')
		}
		first = false
		out = append(append(append(out, '"'), p.nodes[c].elem...), `":`...)
		out = p.append(out, c)
	}
	return append(out, '}')
}

// touches says whether the two sets have a path in common.
func touches(a *paths, ai int32, b *paths, bi int32) bool {
	if a.nodes[ai].member && b.nodes[bi].member {
		return true
	}
	x, y := a.nodes[ai].child, b.nodes[bi].child
	for x != 0 && y != 0 {
		switch c := compare(a.nodes[x].elem, b.nodes[y].elem); {
		case c < 0:
			x = a.nodes[x].next
		case c > 0:
			y = b.nodes[y].next
		default:
			if touches(a, x, b, y) {
				return true
			}
			x, y = a.nodes[x].next, b.nodes[y].next
		}
	}
	return false
}

// without copies the children of a that are not in b below the node at of p.
func (p *paths) without(at int32, a *paths, ai int32, b *paths, bi int32) {
	y := b.nodes[bi].child
	for x := a.nodes[ai].child; x != 0; x = a.nodes[x].next {
		for y != 0 && compare(b.nodes[y].elem, a.nodes[x].elem) < 0 {
			y = b.nodes[y].next
		}
		i := p.add(at, a.nodes[x].elem)
		if y == 0 || b.nodes[y].elem != a.nodes[x].elem {
			p.nodes[i].member = a.nodes[x].member
			p.copy(i, a, x)
		} else {
			p.nodes[i].member = a.nodes[x].member && !b.nodes[y].member
			p.without(i, a, x, b, y)
		}
		p.dropEmpty(at, i)
	}
}

// copy copies the children of a below the node at of p.
func (p *paths) copy(at int32, a *paths, ai int32) {
	for x := a.nodes[ai].child; x != 0; x = a.nodes[x].next {
		i := p.add(at, a.nodes[x].elem)
		p.nodes[i].member = a.nodes[x].member
		p.copy(i, a, x)
	}
}

// union copies the children of a and b below the node at of p.
func (p *paths) union(at int32, a *paths, ai int32, b *paths, bi int32) {
	x, y := a.nodes[ai].child, b.nodes[bi].child
	for x != 0 || y != 0 {
		c := 0
		switch {
		case y == 0:
			c = -1
		case x == 0:
			c = 1
		default:
			c = compare(a.nodes[x].elem, b.nodes[y].elem)
		}
		switch {
		case c < 0:
			i := p.add(at, a.nodes[x].elem)
			p.nodes[i].member = a.nodes[x].member
			p.copy(i, a, x)
			x = a.nodes[x].next
		case c > 0:
			i := p.add(at, b.nodes[y].elem)
			p.nodes[i].member = b.nodes[y].member
			p.copy(i, b, y)
			y = b.nodes[y].next
		default:
			i := p.add(at, a.nodes[x].elem)
			p.nodes[i].member = a.nodes[x].member || b.nodes[y].member
			p.union(i, a, x, b, y)
			x, y = a.nodes[x].next, b.nodes[y].next
		}
	}
}

// rank orders the kinds of path elements as they are written: fields, keys, values.
func rank(elem string) int {
	switch elem[0] {
	case 'f':
		return 0
	case 'k':
		return 1
	}
	return 2
}

// compare orders two path elements as structured-merge-diff does.
func compare(a, b string) int {
	if a == b {
		return 0
	}
	ra, rb := rank(a), rank(b)
	if ra != rb {
		return ra - rb
	}
	a, b = a[2:], b[2:]
	switch ra {
	case 0:
		return strings.Compare(a, b)
	case 1:
		return compareKeys(a, b)
	}
	return compareScalars(a, b)
}

// compareKeys orders {\"name\":value,...} by names and values in turn.
func compareKeys(a, b string) int {
	a, b = strings.TrimSuffix(a[1:], "}"), strings.TrimSuffix(b[1:], "}")
	for a != "" && b != "" {
		var na, nb, va, vb string
		na, va, a = cutKey(a)
		nb, vb, b = cutKey(b)
		if c := strings.Compare(na, nb); c != 0 {
			return c
		}
		if c := compareScalars(va, vb); c != 0 {
			return c
		}
	}
	return len(a) - len(b)
}

// cutKey takes one \"name\":value and the comma behind it from the front. Values are plain: the end of a string is the
// next \".
func cutKey(s string) (name, value, rest string) {
	s = s[len(`\"`):]
	name, s, _ = strings.Cut(s, `\":`)
	if strings.HasPrefix(s, `\"`) {
		end := len(`\"`) + strings.Index(s[len(`\"`):], `\"`) + len(`\"`)
		value, rest = s[:end], s[end:]
	} else if end := strings.IndexByte(s, ','); end >= 0 {
		value, rest = s[:end], s[end:]
	} else {
		value = s
	}
	return name, value, strings.TrimPrefix(rest, ",")
}

// compareScalars orders numbers before strings before booleans.
func compareScalars(a, b string) int {
	ka, kb := scalarRank(a), scalarRank(b)
	if ka != kb {
		return ka - kb
	}
	switch ka {
	case 0:
		return compareNumbers(a, b)
	case 1: // without the quotes, which are greater than most characters
		a, b = strings.TrimSuffix(a, `\"`), strings.TrimSuffix(b, `\"`)
	}
	return strings.Compare(a, b)
}

func scalarRank(s string) int {
	switch {
	case strings.HasPrefix(s, `\"`):
		return 1
	case s == "true" || s == "false":
		return 2
	}
	return 0
}

// compareNumbers orders integers that are written without leading zeros.
func compareNumbers(a, b string) int {
	na, nb := strings.HasPrefix(a, "-"), strings.HasPrefix(b, "-")
	switch {
	case na && !nb:
		return -1
	case nb && !na:
		return 1
	case na:
		a, b = b[1:], a[1:]
	}
	if len(a) != len(b) {
		return len(a) - len(b)
	}
	return strings.Compare(a, b)
}

// plain says whether a text is written as it is, whatever escaping JSON encoders do.
func plain(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}
