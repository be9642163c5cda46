variable "name" {
  type        = string
  description = "Begins the name of everything made here."
}

variable "cidr" {
  type        = string
  description = "Addresses of the network; six subnets are cut from it."
}

variable "zones" {
  type        = map(string)
  description = "Letter of a zone to the zone's name: {a = \"us-east-1a\", ...}."
}

variable "nat_gateways" {
  type        = number
  description = "In how many zones there is a NAT gateway; the other zones use the first one."
}

variable "flow_log_days" {
  type        = number
  description = "Days that flow logs are kept."
}
