package ownership

import (
	"strings"
)

// parser reads the JSON of a set in the one form in which it is always written: no white space, elements in order, nothing
// unknown. It also refuses a set that the schema has overtaken (a part of what is now atomic).
type parser struct {
	in  string
	out *paths
}

// parse gives false for a set in any other form.
func (p *parser) parse(in string, out *paths, s *shape) bool {
	p.in, p.out = in, out.reset()
	if !p.object(root, s) || p.in != "" {
		return false
	}
	return !out.empty() && !out.nodes[root].member
}

func (p *parser) eat(s string) bool {
	rest, ok := strings.CutPrefix(p.in, s)
	if ok {
		p.in = rest
	}
	return ok
}

// object reads the children of a node; s is nil where the schema says nothing.
func (p *parser) object(at int32, s *shape) bool {
	if !p.eat("{") {
		return false
	}
	if p.eat("}") {
		p.out.nodes[at].member = true
		return true
	}
	if s != nil && s.atomic {
		return false
	}
	if p.eat(`".":{}`) {
		p.out.nodes[at].member = true
		if !p.eat(",") {
			return false
		}
	}
	fieldAt := 0
	for {
		elem, ok := p.element()
		if !ok {
			return false
		}
		if last := p.out.nodes[at].last; last != 0 && compare(p.out.nodes[last].elem, elem) >= 0 {
			return false
		}
		inner, ok := s.child(elem, &fieldAt)
		if !ok || !p.object(p.out.add(at, elem), inner) {
			return false
		}
		if p.eat("}") {
			return true
		}
		if !p.eat(",") {
			return false
		}
	}
}

// child gives the shape below a path element; at is where the search among the fields goes on, since elements come in their
// order.
func (s *shape) child(elem string, at *int) (*shape, bool) {
	if s == nil {
		return nil, true
	}
	switch s.kind {
	case structure:
		for ; *at < len(s.fields); *at++ {
			switch c := strings.Compare(s.fields[*at].elem, elem); {
			case c == 0:
				return s.fields[*at].shape, !s.fields[*at].never
			case c > 0:
				return nil, true
			}
		}
		return nil, true
	case dictionary, list:
		return s.elem, true
	case opaque:
		return nil, false
	}
	return nil, true
}

// element reads "elem": and checks that it is written in the canonical way.
func (p *parser) element() (string, bool) {
	if !p.eat(`"`) {
		return "", false
	}
	end := 0
	for end < len(p.in) && p.in[end] != '"' {
		if p.in[end] == '\\' {
			end++
		}
		end++
	}
	if end+1 >= len(p.in) || p.in[end+1] != ':' {
		return "", false
	}
	elem := p.in[:end]
	p.in = p.in[end+2:]
	return elem, canonical(elem)
}

func canonical(elem string) bool {
	if len(elem) < 2 || elem[1] != ':' {
		return false
	}
	rest := elem[2:]
	switch elem[0] {
	case 'f':
		return plain(rest)
	case 'v':
		return canonicalScalar(rest)
	case 'k':
		return canonicalKeys(rest)
	}
	return false
}

func canonicalScalar(s string) bool {
	if rest, ok := strings.CutPrefix(s, `\"`); ok {
		text, ok := strings.CutSuffix(rest, `\"`)
		return ok && plain(text)
	}
	if s == "true" || s == "false" {
		return true
	}
	digits := strings.TrimPrefix(s, "-")
	if digits == "" || len(digits) > 18 || digits[0] == '0' && s != "0" {
		return false
	}
	return strings.Trim(digits, "0123456789") == ""
}

func canonicalKeys(s string) bool {
	if len(s) < 2 || s[0] != '{' || s[len(s)-1] != '}' {
		return false
	}
	rest, before := s[1:len(s)-1], ""
	if rest == "" {
		return false
	}
	for rest != "" {
		after, ok := strings.CutPrefix(rest, `\"`)
		if !ok {
			return false
		}
		name, value, ok := strings.Cut(after, `\":`)
		if !ok || !plain(name) || name <= before {
			return false
		}
		end := strings.IndexByte(value, ',')
		if text, ok := strings.CutPrefix(value, `\"`); ok {
			closing := strings.Index(text, `\"`)
			if closing < 0 {
				return false
			}
			end = len(`\"`) + closing + len(`\"`)
			if end == len(value) {
				end = -1
			} else if value[end] != ',' {
				return false
			}
		}
		if end < 0 {
			return canonicalScalar(value)
		}
		if !canonicalScalar(value[:end]) || end+1 == len(value) {
			return false
		}
		before, rest = name, value[end+1:]
	}
	return false
}
